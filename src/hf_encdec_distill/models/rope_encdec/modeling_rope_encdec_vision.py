"""A RoPE encoder-decoder whose encoder reads images between the tokens of its prompt.

A vision tower gives a state for each patch of an image, a projector of two layers brings them to the encoder's width,
and they take the places of the image tokens in the prompt: LLaVA (arXiv 2304.08485, section 4.1; two layers, arXiv
2310.03744), whose decoder-only model is an encoder and a decoder here. The decoder sees images through what the
encoder hands over alone.

This file travels to the Hub beside the weights: it imports only torch, transformers and its own siblings.

Shapes as in `modeling_rope_encdec`; I images (or tiles of images) of a batch, F tokens of each, C channels of a
patch's state.
"""

import torch
from torch import nn
from transformers import AutoModel
from transformers.activations import ACT2FN

# transformers 4.57 copies from a folder what a file names itself, and not what that names. Goes when 4.57 is dropped.
from .compat_rope_encdec import CACHE_FIELD  # noqa: F401
from .configuration_rope_encdec import RopeEncDecConfig
from .configuration_rope_encdec_vision import RopeEncDecVisionConfig
from .modeling_rope_encdec import (
    RopeEncDecDecoder,
    RopeEncDecEncoder,
    RopeEncDecForConditionalGeneration,
    RopeEncDecModel,
    RopeEncDecPreTrainedModel,
)


# The names of the last norm in the towers that can be read.
_FINAL_NORMS = ("post_layernorm", "layernorm")
_TOWER = "vision_tower"


class RopeEncDecVisionPreTrainedModel(RopeEncDecPreTrainedModel):
    config_class: type[RopeEncDecConfig] = RopeEncDecVisionConfig
    input_modalities = ["image", "text"]
    # Layers of towers under the names that transformers gives them.
    _no_split_modules = [
        *RopeEncDecPreTrainedModel._no_split_modules,
        "CLIPEncoderLayer",
        "SiglipEncoderLayer",
        "Dinov2Layer",
        "Dinov2WithRegistersLayer",
    ]

    def post_init(self):
        super().post_init()
        # A tower's projections have the names of ours, but not all of them: it stays whole on each rank.
        self._tp_plan = {name: style for name, style in self._tp_plan.items() if _TOWER not in name}


class RopeEncDecProjector(nn.Module):
    """`(I, patches, C)` to `(I, F, H)`. Names are those of transformers' LLaVA."""

    def __init__(self, config: RopeEncDecVisionConfig):
        super().__init__()
        self.shuffle = config.projector_pixel_shuffle
        width = config.vision_config.hidden_size * self.shuffle**2
        self.linear_1 = nn.Linear(width, config.hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, features, rows, columns):
        """
        Args:
            features (`torch.FloatTensor` of shape `(I, rows * columns, C)`): Patches, row by row.
        """
        if self.shuffle > 1:
            # As Idefics3 (transformers v5.24.0): within a token, patches stand row by row. Core ML has no more than
            # five dimensions.
            n, (images, _, channels) = self.shuffle, features.shape
            features = features.reshape(images * (rows // n), n, columns // n, n * channels).transpose(1, 2)
            features = features.reshape(images, (rows // n) * (columns // n), n * n * channels)
        return self.linear_2(self.act(self.linear_1(features)))


class RopeEncDecVisionEncoder(RopeEncDecVisionPreTrainedModel, RopeEncDecEncoder):
    """[`RopeEncDecEncoder`] with a vision tower and a projector."""

    def __init__(self, config: RopeEncDecVisionConfig):
        super().__init__(config)
        self.vision_tower = _tower(config)
        self.multi_modal_projector = RopeEncDecProjector(config)
        self.post_init()

    def get_image_features(self, pixel_values):
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(I, 3, height, width)`): Images or their tiles, of all prompts.

        Returns:
            `torch.FloatTensor` of shape `(I, F, H)`

        Raises:
            ValueError: the pixels are no batch of images, or do not divide into patches and tokens.
        """
        if pixel_values.dim() != 4:
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values.shape)}: expected (images, channels, height, width), the "
                "images of all prompts one after the other."
            )
        height, width = pixel_values.shape[-2:]
        self.config.image_tokens(height, width)
        vision, options = self.config.vision_config, {}
        # DINOv2 fits its positions to the image by itself, the others on demand.
        if (height, width) != (vision.image_size,) * 2 and not vision.model_type.startswith("dinov2"):
            options["interpolate_pos_encoding"] = True
        # Each tower casts to the dtype of its own embedding of patches.
        states = self.vision_tower(pixel_values=pixel_values, **options).last_hidden_state
        rows, columns = height // vision.patch_size, width // vision.patch_size
        patches = states[:, -rows * columns :]  # in front of them stand what some towers call class and registers
        # The dtype of the tokens among which they stand: weights of the projector may be quantised.
        return self.multi_modal_projector(patches.to(self.embed_tokens.weight.dtype), rows, columns)

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, pixel_values=None, **kwargs
    ):
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(B, S)`): Prompts, `image_token_id` F times for each image.
            pixel_values (`torch.FloatTensor` of shape `(I, 3, height, width)`, *optional*): The images in the order of
                their tokens, through all prompts.

        All others as in [`RopeEncDecEncoder`].

        Raises:
            ValueError: there are not as many image tokens as features, images come with `inputs_embeds`, or what
                [`RopeEncDecEncoder`] and `get_image_features` refuse.
        """
        if pixel_values is not None and input_ids is None:
            raise ValueError(
                "pixel_values need input_ids, which say where the images stand; with inputs_embeds, put the features "
                "of get_image_features(pixel_values) there yourself."
            )
        if input_ids is not None and inputs_embeds is None:
            inputs_embeds, input_ids = self._embed(input_ids, pixel_values), None
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def _embed(self, input_ids, pixel_values):
        embedded, is_image = self.embed_tokens(input_ids), input_ids == self.config.image_token_id
        features = None if pixel_values is None else self.get_image_features(pixel_values)
        # What is compiled or exported cannot look at ids.
        if not torch.compiler.is_compiling():
            tokens, there = int(is_image.sum()), 0 if features is None else features.shape[0] * features.shape[1]
            if tokens != there:
                what = f"{tokens} image tokens (id {self.config.image_token_id})"
                if features is None:
                    raise ValueError(f"{what} and no pixel_values: give the images that they stand for.")
                raise ValueError(
                    f"{what} for {there} image features ({features.shape[0]} images of {features.shape[1]}): the "
                    "processor writes as many tokens as an image needs; limits of length must not cut them."
                )
        if features is None:
            return embedded
        return embedded.masked_scatter(is_image.unsqueeze(-1), features.to(embedded.device, embedded.dtype))


class RopeEncDecVisionModel(RopeEncDecVisionPreTrainedModel, RopeEncDecModel):
    """Encoder with its vision tower, and decoder, without a head."""

    def __init__(self, config: RopeEncDecVisionConfig):
        RopeEncDecVisionPreTrainedModel.__init__(self, config)
        self.encoder = RopeEncDecVisionEncoder(config)
        self.decoder = RopeEncDecDecoder(config)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        encoder_outputs=None,
        **kwargs,
    ):
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(I, 3, height, width)`, *optional*): See
                [`RopeEncDecVisionEncoder`].

        All others, and what comes back, as in [`RopeEncDecModel`].
        """
        if encoder_outputs is None:
            flags = ("output_attentions", "output_hidden_states")
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                pixel_values=pixel_values,
                **{name: kwargs[name] for name in flags if name in kwargs},
                return_dict=True,
            )
        return super().forward(
            attention_mask=attention_mask, position_ids=position_ids, encoder_outputs=encoder_outputs, **kwargs
        )


class RopeEncDecForImageTextToText(RopeEncDecVisionPreTrainedModel, RopeEncDecForConditionalGeneration):
    """Encoder with its vision tower, decoder and LM head."""

    def __init__(self, config: RopeEncDecVisionConfig):
        RopeEncDecVisionPreTrainedModel.__init__(self, config)
        self.model = RopeEncDecVisionModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForMaskedLM"  # labels stand where their logits do; nothing is shifted
        self.tokenizer = None
        self.post_init()

    @classmethod
    def from_decoder_only(cls, teacher, **kwargs):
        """Refused: the text student comes first.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "RopeEncDecForImageTextToText.from_decoder_only: build the text student with "
            "RopeEncDecForConditionalGeneration.from_decoder_only, then give it eyes with "
            "RopeEncDecForImageTextToText.from_parts(student, vision_model)."
        )

    @classmethod
    def from_parts(cls, text_student, vision_model, **kwargs):
        """Put a vision tower in front of a text student; see
        [`hf_encdec_distill.models.rope_encdec.vision.from_parts`] for the arguments."""
        try:
            from hf_encdec_distill.models.rope_encdec.vision import from_parts
        except ImportError as error:
            raise ImportError(
                "from_parts needs the package that this model file comes from: pip install hf-encdec-distill"
            ) from error
        return from_parts(text_student, vision_model, model_class=cls, **kwargs)

    def get_encoder(self, modality=None):
        return self.model.encoder.vision_tower if modality == "image" else super().get_encoder(modality)

    def get_image_features(self, pixel_values):
        """`(I, F, H)`: see [`RopeEncDecVisionEncoder`]."""
        return self.model.encoder.get_image_features(pixel_values)

    # Spelled out, since `Trainer` and `generate` read the signature.
    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        decoder_position_ids=None,
        encoder_outputs=None,
        past_key_values=None,
        inputs_embeds=None,
        decoder_inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        cache=None,
        **kwargs,
    ):
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(I, 3, height, width)`, *optional*): See
                [`RopeEncDecVisionEncoder`].

        All others, and what comes back, as in [`RopeEncDecForConditionalGeneration`].
        """
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_position_ids=decoder_position_ids,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            cache=cache,
            **kwargs,
        )


def _tower(config: RopeEncDecVisionConfig) -> nn.Module:
    """The vision model without what nothing reads: a pooling head, and the last norm unless features pass it."""
    if config.vision_config.model_type == "siglip_vision_model":
        config.vision_config.vision_use_head = False
    tower = AutoModel.from_config(config.vision_config)
    # transformers 4.57 has one more module around CLIP and SigLIP, whose name would be part of each weight's. Goes
    # when 4.57 is dropped.
    tower = getattr(tower, "vision_model", tower)
    if not config.vision_final_norm:
        for name in _FINAL_NORMS:
            if hasattr(tower, name):
                setattr(tower, name, nn.Identity())
    return tower


__all__ = [
    "RopeEncDecForImageTextToText",
    "RopeEncDecVisionModel",
    "RopeEncDecVisionPreTrainedModel",
]
