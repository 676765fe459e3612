"""Configuration of the RoPE encoder-decoder whose encoder reads images too.

This file travels to the Hub beside the weights: it imports only transformers and its own siblings.
"""

from transformers import AutoConfig

# transformers 4.57 copies from a folder what a file names itself, and not what that names. Goes when 4.57 is dropped.
from .compat_rope_encdec import PreTrainedConfig  # noqa: F401
from .configuration_rope_encdec import RopeEncDecConfig, _check, _is_positive_int


_AUTO_MAP = {
    "AutoConfig": "configuration_rope_encdec_vision.RopeEncDecVisionConfig",
    "AutoModel": "modeling_rope_encdec_vision.RopeEncDecVisionModel",
    "AutoModelForImageTextToText": "modeling_rope_encdec_vision.RopeEncDecForImageTextToText",
}
# Towers whose patches stand behind their prefix tokens in the order of rows and columns.
VISION_MODEL_TYPES = ("clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers")


class RopeEncDecVisionConfig(RopeEncDecConfig):
    """All fields of [`RopeEncDecConfig`], for encoder and decoder, and those of the images.

    Args:
        vision_config (`dict` or [`PreTrainedConfig`]): Of the vision tower: `model_type` is one of `clip_vision_model`
            (CLIP), `siglip_vision_model` (SigLIP, SigLIP 2 at a fixed resolution), `dinov2` and
            `dinov2_with_registers`. Its `num_hidden_layers` are those that are computed: a tower has no layer above
            the one whose features are read.
        vision_final_norm (`bool`, defaults to `False`): Whether features pass the tower's last norm, as in DINOv2; not
            in LLaVA and Mu, which read a layer below the top.
        image_token_id (`int`, defaults to 3): The token that stands in the prompt once for each image feature.
        projector_hidden_act (`str`, defaults to `"gelu"`): Between the projector's two layers (LLaVA-1.5, arXiv
            2310.03744, section 3.2).
        projector_pixel_shuffle (`int`, defaults to 1): So many patches by so many become one token, their features
            side by side (InternVL 1.5, arXiv 2404.16821, section 3.1).

    Raises:
        ValueError: a value that does not work; the message has the field, the value and what it has to be.
    """

    model_type = "rope_encdec_vision"
    sub_configs = {"vision_config": AutoConfig}

    def __init__(
        self,
        vision_config=None,
        vision_final_norm=False,
        image_token_id=3,
        projector_hidden_act="gelu",
        projector_pixel_shuffle=1,
        **kwargs,
    ):
        if vision_config is None:
            vision_config = {"model_type": "clip_vision_model"}
        given = isinstance(vision_config, dict)
        kind = vision_config.get("model_type") if given else vision_config.model_type
        _check(kind in VISION_MODEL_TYPES, "vision_config.model_type", kind, f"one of {VISION_MODEL_TYPES}")
        _check(
            not (vision_final_norm and kind == "clip_vision_model"),
            "vision_final_norm",
            vision_final_norm,
            "False for CLIP, whose last norm is for its class token alone",
        )
        self.vision_config = AutoConfig.for_model(**vision_config) if given else vision_config
        self.vision_final_norm = vision_final_norm
        self.image_token_id = image_token_id
        self.projector_hidden_act = projector_hidden_act
        self.projector_pixel_shuffle = projector_pixel_shuffle
        super().__init__(**kwargs)
        _check(
            isinstance(image_token_id, int) and 0 <= image_token_id < self.vocab_size,
            "image_token_id",
            image_token_id,
            f"a token, 0 to {self.vocab_size - 1}",
        )
        _check(
            _is_positive_int(projector_pixel_shuffle),
            "projector_pixel_shuffle",
            projector_pixel_shuffle,
            "a whole number of at least 1",
        )

    def to_dict(self):
        fields = super().to_dict()
        # Of a subclass elsewhere the files beside the weights are others, which `save_pretrained` lists.
        return {**fields, "auto_map": dict(_AUTO_MAP)} if type(self).__name__ == "RopeEncDecVisionConfig" else fields

    def image_tokens(self, height: int, width: int) -> int:
        """How many tokens an image of so many pixels becomes.

        Raises:
            ValueError: its patches do not divide into groups that become a token.
        """
        patch = self.vision_config.patch_size * self.projector_pixel_shuffle
        if height % patch or width % patch:
            raise ValueError(
                f"An image of {height} x {width} pixels: a token is made of {patch} x {patch} of them "
                f"(vision_config.patch_size={self.vision_config.patch_size}, projector_pixel_shuffle="
                f"{self.projector_pixel_shuffle}). Give multiples of {patch}."
            )
        return (height // patch) * (width // patch)


__all__ = ["RopeEncDecVisionConfig"]
