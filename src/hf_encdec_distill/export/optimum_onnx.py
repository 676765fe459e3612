"""How Optimum exports our model to ONNX: `main_export`, `ORTModelForSeq2SeqLM.from_pretrained(..., export=True)` and
`optimum-cli export onnx`. Imported by `registration` as soon as Optimum's own recipes are.

Written against optimum-onnx v0.1.0.
"""

from optimum.exporters.onnx.config import TextSeq2SeqOnnxConfig
from optimum.exporters.onnx.model_patcher import ModelPatcher, sdpa_mask_without_vmap
from optimum.exporters.tasks import TasksManager
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .optimum_recipe import MODEL_TYPE, TASKS, RopeEncDecRecipe, TraceableModel, additive_mask, grouped_attention


ALL_ATTENTION_FUNCTIONS.register("rope_encdec_onnx", grouped_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("rope_encdec_onnx", additive_mask(sdpa_mask_without_vmap))


class RopeEncDecModelPatcher(TraceableModel, ModelPatcher):
    attention = "rope_encdec_onnx"


class RopeEncDecOnnxConfig(RopeEncDecRecipe, TextSeq2SeqOnnxConfig):
    _MODEL_PATCHER = RopeEncDecModelPatcher


TasksManager.create_register("onnx")(MODEL_TYPE, *TASKS)(RopeEncDecOnnxConfig)
