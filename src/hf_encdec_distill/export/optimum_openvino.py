"""How Optimum exports our model to OpenVINO: `OVModelForSeq2SeqLM.from_pretrained(..., export=True)` and
`optimum-cli export openvino`. Imported by `registration` as soon as Optimum's own recipes are.

Written against optimum-intel v1.27.0, which builds on optimum-onnx and admits transformers 4.57, and v2.2.0, which has
bases of its own and admits transformers up to 5.5: optimum/exporters/openvino/model_configs.py and model_patcher.py.
"""

import functools

import torch
from optimum.exporters.openvino.model_patcher import OVSeq2SeqModelPatcher
from optimum.exporters.tasks import TasksManager
from torch import nn
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..models.rope_encdec.modeling_rope_encdec import RopeEncDecDecoderLayer
from .optimum_recipe import MODEL_TYPE, TASKS, RopeEncDecRecipe, TraceableModel, additive_mask, grouped_attention


try:
    from optimum.exporters.openvino.config import TextSeq2SeqOpenVINOConfig
    from optimum.exporters.openvino.patching_utils import PatchingSpec, sdpa_mask_without_vmap
except ModuleNotFoundError:  # optimum-intel < 2; goes with transformers 4.57
    from optimum.exporters.onnx.config import TextSeq2SeqOnnxConfig as TextSeq2SeqOpenVINOConfig
    from optimum.exporters.onnx.model_patcher import PatchingSpec, sdpa_mask_without_vmap


def _attention(module, query, key, value, attention_mask, **kwargs):
    """Shapes as in [`grouped_attention`].

    OpenVINO's CPU plugin (v2026.4) fuses self-attention with the state that is its cache, and then knows repeated
    heads but takes folded ones for more queries than there are new keys. Of cross-attention's state it cannot compile
    a repeat ("ReadValueWithSubgraph operation with dynamic rank").
    """
    if not module.is_causal:
        return grouped_attention(module, query, key, value, attention_mask)
    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    output = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
    return output.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("rope_encdec_openvino", _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("rope_encdec_openvino", additive_mask(sdpa_mask_without_vmap))

_split = torch.Tensor.split


def _split_by_gathering(tensor, split_size, dim=0):
    """`torch.Tensor.split`, for the states that the decoder reads: one operation with several outputs is more than
    OpenVINO's CPU plugin (v2026.4) can have between an input and a state, and it makes one of slices too."""
    if not isinstance(split_size, int):
        return _split(tensor, split_size, dim)
    indices = torch.arange(int(tensor.shape[dim]))
    return tuple(tensor.index_select(dim, part) for part in _split(indices, split_size))


def _project_prompt(module, twins, *args):
    """`RopeEncDecMergedAttention.project_prompt` through twins of the two projections."""
    for name, twin in twins.items():
        getattr(module, name).forward = twin
    try:
        return type(module).project_prompt(module, *args)
    finally:
        for name in twins:
            del getattr(module, name).forward


def _with_copies(place, size, layer, *args, **kwargs):
    """A decoder layer that shares keys and values of the prompt, the last two of `args`, with its own copies: what is
    twice among the outputs of a graph gets both names in OpenVINO (v2026.4), and Optimum reads one."""
    copies = (torch.stack([part] * size)[place] for part in args[6:])
    return type(layer).forward(layer, *args[:6], *copies, **kwargs)


class RopeEncDecOVModelPatcher(TraceableModel, OVSeq2SeqModelPatcher):
    attention = "rope_encdec_openvino"

    def __enter__(self):
        super().__enter__()
        # Prompt and target share these weights in a merged decoder. What fills a state is a graph of its own in the
        # CPU plugin (v2026.4), which does not take scales of compressed weights from the graph around it. The twins
        # are copies for the time of the export; equal constants are written once.
        self._merged = [module for module in self._model.modules() if hasattr(module, "project_prompt")]
        for module in self._merged:
            twins = {}
            for name in ("k_proj", "v_proj"):
                weights = {key: weight.detach().clone() for key, weight in getattr(module, name).named_parameters()}
                twins[name] = functools.partial(nn.functional.linear, **weights)
            module.project_prompt = functools.partial(_project_prompt, module, twins)
        size = self._model.config.cross_attention_sharing
        layers = [module for module in self._model.modules() if isinstance(module, RopeEncDecDecoderLayer)]
        for index, layer in enumerate(layers):
            if index % size:
                self._patch(layer, functools.partial(_with_copies, index % size, size))

    def __exit__(self, *exception):
        for module in self._merged:
            del module.project_prompt
        super().__exit__(*exception)


class RopeEncDecOpenVINOConfig(RopeEncDecRecipe, TextSeq2SeqOpenVINOConfig):
    _MODEL_PATCHER = RopeEncDecOVModelPatcher

    @property
    def PATCHING_SPECS(self):  # noqa: N802
        # A new list each time, since the patcher adds its own to it.
        return [PatchingSpec(torch.Tensor, "split", _split_by_gathering, _split)]


# Optimum has taken the ONNX recipe over if that was there first.
TasksManager.create_register("openvino", overwrite_existing=True)(MODEL_TYPE, *TASKS)(RopeEncDecOpenVINOConfig)
