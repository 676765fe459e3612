"""How Optimum exports our model to OpenVINO: `OVModelForSeq2SeqLM.from_pretrained(..., export=True)` and
`optimum-cli export openvino`. Imported by `optimum_registration` as soon as Optimum's own recipes are.

Written against optimum-intel v1.27.0: optimum/exporters/openvino/model_configs.py and model_patcher.py.
"""

from optimum.exporters.openvino.model_patcher import OVSeq2SeqModelPatcher
from optimum.exporters.tasks import TasksManager

from .optimum_onnx import MODEL_TYPE, TASKS, RopeEncDecOnnxConfig, TraceableModel


class RopeEncDecOVModelPatcher(TraceableModel, OVSeq2SeqModelPatcher):
    pass


class RopeEncDecOpenVINOConfig(RopeEncDecOnnxConfig):
    _MODEL_PATCHER = RopeEncDecOVModelPatcher


TasksManager.create_register("openvino")(MODEL_TYPE, *TASKS)(RopeEncDecOpenVINOConfig)
