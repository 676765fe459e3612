"""Distil a decoder-only language model into a RoPE encoder-decoder that plugs into transformers.

Importing the package registers the model with the `Auto` classes, and more with transformers' pipelines and with
Optimum, once those are imported (see `registration`). What is named here is imported on first use (PEP 562).
"""

from typing import TYPE_CHECKING

from ._lazy import on_first_use
from ._moved import find_moved_modules
from .registration import register


register()
find_moved_modules()

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .distillation.arguments import DistillationTrainingArguments as DistillationTrainingArguments
    from .distillation.trainer import DistillationTrainer as DistillationTrainer
    from .models.rope_encdec import RopeEncDecConfig as RopeEncDecConfig
    from .models.rope_encdec import RopeEncDecEncoderModel as RopeEncDecEncoderModel
    from .models.rope_encdec import RopeEncDecForConditionalGeneration as RopeEncDecForConditionalGeneration
    from .models.rope_encdec import RopeEncDecForImageTextToText as RopeEncDecForImageTextToText
    from .models.rope_encdec import RopeEncDecModel as RopeEncDecModel
    from .models.rope_encdec import RopeEncDecVisionConfig as RopeEncDecVisionConfig
    from .models.rope_encdec import RopeEncDecVisionModel as RopeEncDecVisionModel
    from .models.rope_encdec.processing_rope_encdec_vision import (
        RopeEncDecVisionProcessor as RopeEncDecVisionProcessor,
    )
else:
    __getattr__, __dir__, __all__ = on_first_use(
        __name__,
        {
            ".distillation.arguments": ["DistillationTrainingArguments"],
            ".distillation.trainer": ["DistillationTrainer"],
            ".models.rope_encdec": [
                "RopeEncDecConfig",
                "RopeEncDecEncoderModel",
                "RopeEncDecForConditionalGeneration",
                "RopeEncDecForImageTextToText",
                "RopeEncDecModel",
                "RopeEncDecVisionConfig",
                "RopeEncDecVisionModel",
            ],
            ".models.rope_encdec.processing_rope_encdec_vision": ["RopeEncDecVisionProcessor"],
        },
    )
