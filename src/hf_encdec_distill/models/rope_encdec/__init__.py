"""The RoPE encoder-decoder: files that travel to the Hub, and what makes their weights."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
)

from .configuration_rope_encdec import RopeEncDecConfig
from .configuration_rope_encdec_vision import RopeEncDecVisionConfig
from .modeling_rope_encdec import RopeEncDecEncoderModel, RopeEncDecForConditionalGeneration, RopeEncDecModel
from .modeling_rope_encdec_vision import RopeEncDecForImageTextToText, RopeEncDecVisionModel


AutoConfig.register("rope_encdec", RopeEncDecConfig, exist_ok=True)
AutoModel.register(RopeEncDecConfig, RopeEncDecModel, exist_ok=True)
AutoModelForSeq2SeqLM.register(RopeEncDecConfig, RopeEncDecForConditionalGeneration, exist_ok=True)
AutoModelForTextEncoding.register(RopeEncDecConfig, RopeEncDecEncoderModel, exist_ok=True)
AutoConfig.register("rope_encdec_vision", RopeEncDecVisionConfig, exist_ok=True)
AutoModel.register(RopeEncDecVisionConfig, RopeEncDecVisionModel, exist_ok=True)
AutoModelForImageTextToText.register(RopeEncDecVisionConfig, RopeEncDecForImageTextToText, exist_ok=True)

# So that `save_pretrained` puts the model files beside the weights.
RopeEncDecConfig.register_for_auto_class()
RopeEncDecModel.register_for_auto_class("AutoModel")
RopeEncDecForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")
RopeEncDecEncoderModel.register_for_auto_class("AutoModelForTextEncoding")
RopeEncDecVisionConfig.register_for_auto_class()
RopeEncDecVisionModel.register_for_auto_class("AutoModel")
RopeEncDecForImageTextToText.register_for_auto_class("AutoModelForImageTextToText")

__all__ = [
    "RopeEncDecConfig",
    "RopeEncDecEncoderModel",
    "RopeEncDecForConditionalGeneration",
    "RopeEncDecForImageTextToText",
    "RopeEncDecModel",
    "RopeEncDecVisionConfig",
    "RopeEncDecVisionModel",
]
