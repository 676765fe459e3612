"""`from_parts`: a text student and a vision model become a student that reads images."""

from __future__ import annotations

import copy
import os

import torch
from torch import nn
from transformers import AddedToken, PreTrainedModel

from ..prompts import in_a_class_of_both_versions
from .configuration_rope_encdec_vision import VISION_MODEL_TYPES, RopeEncDecVisionConfig
from .modeling_rope_encdec_vision import RopeEncDecForImageTextToText


def from_parts(
    text_student: PreTrainedModel,
    vision_model: PreTrainedModel,
    *,
    model_class: type = RopeEncDecForImageTextToText,
    tokenizer=None,
    image_token: str = "<image>",
    vision_feature_layer: int = -2,
    vision_final_norm: bool = False,
    projector_pixel_shuffle: int = 1,
    projector: nn.Module | None = None,
) -> RopeEncDecForImageTextToText:
    """A student with the weights of both; only the projector is new, and the image token if the tokenizer lacks it.

    Args:
        text_student ([`RopeEncDecForConditionalGeneration`]): It is left as it is.
        vision_model: CLIP's, SigLIP's or DINOv2's, whole or its vision half. Layers above the features are left out.
        model_class: what to build.
        tokenizer: by default the one that the text student carries. A copy is taken.
        image_token: stands for an image in a prompt. Where it is no token yet, it is added, with the mean of all
            embeddings.
        vision_feature_layer: the state that is read, as an index into the tower's `hidden_states`: -2 in LLaVA and Mu.
        vision_final_norm: whether it passes the tower's last norm, for models whose last state was trained with it.
        projector_pixel_shuffle: see [`RopeEncDecVisionConfig`].
        projector: two layers `linear_1` and `linear_2` to begin with, as LLaVA's `multi_modal_projector`.

    Returns:
        The student, in the dtype of the text student, in evaluation mode, with the tokenizer as `tokenizer`.

    Raises:
        ValueError: the text student is none, or has no tokenizer and none is given, the image token is several tokens,
            the vision model is of another kind or has no such layer, or the projector has other sizes.
    """
    config = text_student.config
    if config.model_type != "rope_encdec":
        raise ValueError(
            f"text_student of type {type(text_student).__name__} ({config.model_type!r}): expected a "
            "RopeEncDecForConditionalGeneration."
        )
    tokenizer = text_student.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ValueError("the text student carries no tokenizer: give it as tokenizer=.")
    tokenizer, token_id = _with_image_token(tokenizer, image_token)
    vision_config, tower = _cut(vision_model, vision_feature_layer)
    fields = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "auto_map")}
    student = model_class(
        RopeEncDecVisionConfig(
            **{**fields, "vocab_size": max(config.vocab_size, token_id + 1)},
            vision_config=vision_config,
            vision_final_norm=vision_final_norm,
            image_token_id=token_id,
            projector_pixel_shuffle=projector_pixel_shuffle,
        )
    ).to(text_student.dtype)
    _copy_text(text_student, student)
    wanted = student.model.encoder.vision_tower.state_dict()
    if lacking := wanted.keys() - tower.keys():
        raise ValueError(
            f"{type(vision_model).__name__} has no {min(lacking)}, nor {len(lacking) - 1} others of a vision tower "
            f"({vision_config['model_type']}): give the vision model itself, such as its vision_tower or dinov2."
        )
    student.model.encoder.vision_tower.load_state_dict({name: tower[name] for name in wanted})
    if projector is not None:
        _copy_projector(projector, student.model.encoder.multi_modal_projector)
    student.generation_config = copy.deepcopy(text_student.generation_config)
    student.tokenizer = tokenizer
    return student.eval()


def _with_image_token(tokenizer, image_token: str):
    ids = tokenizer(image_token, add_special_tokens=False)["input_ids"]
    tokenizer = in_a_class_of_both_versions(copy.deepcopy(tokenizer))
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        tokenizer.add_tokens([AddedToken(image_token, special=True, normalized=False)], special_tokens=True)
        ids = tokenizer(image_token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"image_token={image_token!r} is {len(ids)} tokens even when added: choose another.")
    return tokenizer, ids[0]


def _cut(vision_model, layer: int) -> tuple[dict, dict[str, torch.Tensor]]:
    """The configuration of the layers up to `layer`, and the weights of all."""
    config = vision_model.config
    config = getattr(config, "vision_config", config)
    if config.model_type not in VISION_MODEL_TYPES:
        raise ValueError(
            f"vision_model of type {type(vision_model).__name__} ({config.model_type!r}): expected one of "
            f"{', '.join(VISION_MODEL_TYPES)}, or a model that has one as its vision_model."
        )
    layers = config.num_hidden_layers
    depth = layer if layer >= 0 else layers + 1 + layer
    if not 1 <= depth <= layers:
        raise ValueError(
            f"vision_feature_layer={layer}: the vision model has {layers} layers, expected 1 to {layers}, or -1 to "
            f"{-layers}."
        )
    # DINOv2's names of its stages are of as many as it has.
    left_out = ("stage_names", "out_features", "out_indices", "_name_or_path")
    fields = {name: value for name, value in config.to_dict().items() if name not in left_out}
    fields["num_hidden_layers"] = depth
    name = vision_model.config._name_or_path
    if name and not os.path.isdir(name):  # on the Hub it is for the model card, and a folder's is nobody's business
        fields["_name_or_path"] = name
    return fields, getattr(vision_model, "vision_model", vision_model).state_dict()


@torch.no_grad()
def _copy_text(text_student, student) -> None:
    """All weights of the text student; a row that its vocabulary lacks becomes the mean of the others."""
    wanted = student.state_dict()
    for name, weight in text_student.state_dict().items():
        place = wanted[name]
        place[: len(weight)] = weight
        if len(place) > len(weight):
            place[len(weight) :] = weight.float().mean(0).to(weight.dtype)


def _copy_projector(projector: nn.Module, ours: nn.Module) -> None:
    given, wanted = projector.state_dict(), ours.state_dict()
    differ = [
        f"{name}: {tuple(given[name].shape) if name in given else 'missing'}, expected {tuple(weight.shape)}"
        for name, weight in wanted.items()
        if name not in given or given[name].shape != weight.shape
    ]
    if differ:
        raise ValueError(f"the projector does not fit: {'; '.join(differ)}.")
    ours.load_state_dict({name: given[name] for name in wanted})
