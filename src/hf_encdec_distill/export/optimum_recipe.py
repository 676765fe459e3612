"""What Optimum's recipes for ONNX and OpenVINO share. Imported by either.

Optimum's encoder-decoders know one output of the encoder, `last_hidden_state`, and hand it to the decoder as
`encoder_hidden_states`. Where our decoder reads other encoder states than the last one, they travel there, side by
side as in `cross_attention_states`.

Written against optimum v2.1.0 and v2.3.0, optimum/exporters/tasks.py, and what optimum-onnx v0.1.0 and optimum-intel
v2.2.0 have alike, since the latter copied it: optimum/exporters/onnx/config.py and model_patcher.py,
optimum/exporters/openvino/config.py and patching_utils.py.
"""

import functools
import inspect
from pathlib import Path

import torch
from optimum.exporters.tasks import TasksManager
from optimum.utils import (
    DummySeq2SeqDecoderTextInputGenerator,
    DummyTextInputGenerator,
    NormalizedSeq2SeqConfig,
    T5DummySeq2SeqPastKeyValuesGenerator,
)
from torch import nn

from ..files import read_json
from ..models.families import RULED_BY_LENGTH
from ..models.rope_encdec import RopeEncDecForConditionalGeneration, RopeEncDecModel
from ..models.rope_encdec.modeling_rope_encdec import (
    RopeEncDecEncoderOutput,
    RopeEncDecPreTrainedModel,
    _once_per_prompt,
    states_handed_over,
)
from .modules import MASKED, TraceableRotary
from .optimum_loading import reads_images
from .recipe import pooled_length


MODEL_TYPE = "rope_encdec"
TASKS = (
    "feature-extraction",
    "feature-extraction-with-past",
    "text2text-generation",
    "text2text-generation-with-past",
)
_TASK_OF_CLASS = {
    RopeEncDecForConditionalGeneration.__name__: "text2text-generation",
    RopeEncDecModel.__name__: "feature-extraction",
}


def grouped_attention(module, query, key, value, attention_mask, **kwargs):
    """`query` `(B, G * R, T, D)` on `(B, G, K, D)` under an additive mask `(B, 1, T, K)`, to `(B, T, G * R, D)`.

    As [`~hf_encdec_distill.export.modules.grouped_attention`], without its look at lengths, which a tracer would take
    for constants: here the mask has always a row for each of the T queries.
    """
    query, attention_mask = _fold_groups(module, query, attention_mask)
    output = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
    return _unfold_groups(module, output, attention_mask), None


def _fold_groups(module, query, attention_mask):
    """The R query heads of a group one after the other on the time axis: `(B, G, R * T, D)`, `(B, 1, R * T, K)`."""
    # B and T are the mask's. A query without RoPE comes out of a reshape, whose lengths torch.onnx (v2.13) writes down
    # as it has seen them.
    batch, length = attention_mask.shape[0], attention_mask.shape[2]
    groups, ratio = module.config.num_key_value_heads, module.num_key_value_groups
    if ratio == 1:
        return query, attention_mask
    return query.reshape(batch, groups, ratio * length, module.head_dim), attention_mask.repeat(1, 1, ratio, 1)


def _unfold_groups(module, output, attention_mask):
    """`(B, G, R * T, D)` to `(B, T, G * R, D)`."""
    ratio = module.num_key_value_groups
    batch, length = attention_mask.shape[0], attention_mask.shape[2]
    if ratio > 1:
        output = output.reshape(batch, module.config.num_attention_heads, length // ratio, module.head_dim)
    return output.transpose(1, 2)


def _merged_attention(
    module,
    hidden_states,
    encoder_states,
    position_embeddings,
    encoder_position_embeddings,
    attention_mask,
    shared=None,
    cache=None,
    positions=None,
    **kwargs,
):
    """`RopeEncDecMergedAttention.forward` with the scores of prompt and target put together instead of their keys: no
    copy of the prompt's keys and values for each token, and OpenVINO (v2026.4) does not compile a stateful prompt that
    is concatenated ("Invalid graph status")."""
    query, key, value = module.project_own(hidden_states, position_embeddings, cache, positions)
    prompt_key, prompt_value = _once_per_prompt(
        cache, module.layer_idx, lambda: module.project_prompt(encoder_states, encoder_position_embeddings), shared
    )
    query, attention_mask = _fold_groups(module, query * module.scaling, attention_mask)
    scores = torch.cat(
        (torch.matmul(query, prompt_key.transpose(2, 3)), torch.matmul(query, key.transpose(2, 3))), dim=-1
    )
    weights = (scores + attention_mask).softmax(dim=-1)
    prompt_length = prompt_key.shape[2]
    output = torch.matmul(weights[..., :prompt_length], prompt_value)
    output = output + torch.matmul(weights[..., prompt_length:], value)
    output = module.o_proj(_unfold_groups(module, output, attention_mask).flatten(-2))
    return output, None, None, (prompt_key, prompt_value)


def additive_mask(sdpa_mask_without_vmap):
    """Optimum's boolean mask as one that is added: `(B, 1, T, K)`, never `None`; finite, so that a row which sees no
    key is not NaN, and within fp16."""

    def mask(dtype, allow_is_causal_skip=False, **kwargs):
        visible = sdpa_mask_without_vmap(allow_is_causal_skip=False, **kwargs)
        return (~visible).to(dtype) * MASKED

    return mask


class TraceableModel:
    """What our model needs for the time of an export besides Optimum's own patches; a mixin for a `ModelPatcher`."""

    attention: str  # in both registries of transformers

    def __init__(self, config, model, model_kwargs=None):
        self._forward_before = vars(model).get("forward")
        super().__init__(config, model, model_kwargs)
        # `patched_forward` looks this up in each call.
        self.orig_forward = _with_one_encoder_tensor(self.orig_forward, config._behavior)

    def __enter__(self):
        super().__enter__()
        self._attention_before = self._model.config._attn_implementation
        self._model.config._attn_implementation = self.attention
        self._patched_modules = []
        for module in self._model.modules():
            if hasattr(module, "project_prompt"):
                self._patch(module, _merged_attention)
            elif getattr(module, "rope_type", None) in RULED_BY_LENGTH:
                self._patch(module, lambda rotary, *args: TraceableRotary(rotary)(*args))

    def _patch(self, module, forward):
        module.forward = functools.partial(forward, module)
        self._patched_modules.append(module)

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self._model.config._attn_implementation = self._attention_before
        for module in self._patched_modules:
            del module.forward
        # Optimum leaves its last wrapper on the model, which may go on being used, or be pickled for validation.
        if self._forward_before is None:
            del self._model.forward
        else:
            self._model.forward = self._forward_before


def _with_one_encoder_tensor(forward, behavior):
    """The encoder's or decoder's `forward` under Optimum's contract of one tensor between the two."""
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def with_one_encoder_tensor(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        if behavior == "decoder":
            states = bound.arguments["encoder_outputs"][0]
            bound.arguments["encoder_outputs"] = RopeEncDecEncoderOutput(
                last_hidden_state=states, cross_attention_states=states
            )
        outputs = forward(*bound.args, **bound.kwargs)
        if behavior == "encoder" and outputs.cross_attention_states is not None:
            return {"last_hidden_state": outputs.cross_attention_states}
        return outputs

    return with_one_encoder_tensor


class DummyEncoderStatesGenerator(DummySeq2SeqDecoderTextInputGenerator):
    """Example inputs of the decoder, the encoder's states `(B, P, R * H)` among them."""

    def __init__(self, task, normalized_config, **kwargs):
        super().__init__(task, normalized_config, **kwargs)
        self.hidden_size *= max(1, len(states_handed_over(normalized_config.config)))
        self.pooling = normalized_config.config.encoder_pooling

    def generate(self, input_name, **kwargs):
        length = self.sequence_length
        if input_name in ("encoder_outputs", "encoder_hidden_states"):
            self.sequence_length = pooled_length(length, self.pooling)
        try:
            return super().generate(input_name, **kwargs)
        finally:
            self.sequence_length = length


class DummyCacheGenerator(T5DummySeq2SeqPastKeyValuesGenerator):
    """Example caches, the prompt's as long as what leaves the encoder."""

    def __init__(self, task, normalized_config, **kwargs):
        super().__init__(task, normalized_config, **kwargs)
        pooling = normalized_config.config.encoder_pooling
        self.encoder_sequence_length = pooled_length(self.encoder_sequence_length, pooling)


class RopeEncDecRecipe:
    """Inputs, outputs and caches of our model, as those of T5 but for the key/value heads and the encoder's output; a
    mixin for Optimum's configuration of encoder-decoders of text."""

    NORMALIZED_CONFIG_CLASS = NormalizedSeq2SeqConfig.with_args(
        encoder_num_layers="encoder_num_hidden_layers",
        decoder_num_layers="decoder_num_hidden_layers",
        # What Optimum calls encoder and decoder here are the caches of cross- and self-attention.
        encoder_num_attention_heads="num_key_value_heads",
        decoder_num_attention_heads="num_key_value_heads",
        key_value_dim="head_dim",
        allow_new=True,
    )
    DUMMY_INPUT_GENERATOR_CLASSES = (
        DummyTextInputGenerator,
        DummyEncoderStatesGenerator,
        DummyCacheGenerator,
    )
    DUMMY_PKV_GENERATOR_CLASS = DummyCacheGenerator

    @property
    def inputs(self):
        return self._with_pooled_axes(super().inputs)

    @property
    def outputs(self):
        return self._with_pooled_axes(super().outputs)

    def _with_pooled_axes(self, ports):
        """Where the encoder pools, what leaves it has a length of its own; with I/O binding Optimum computes it from
        the name."""
        pooling, whole = self._config.encoder_pooling, "encoder_sequence_length"
        if pooling == 1:
            return ports
        pooled = f"( {whole} + {pooling} - 1 ) // {pooling}"
        return {
            name: {axis: pooled if of == whole else of for axis, of in axes.items()}
            if name in ("encoder_outputs", "last_hidden_state") or ".encoder." in name
            else axes
            for name, axes in ports.items()
        }


def _know_our_classes(infer, answer):
    """A classmethod of `TasksManager` that asks what a model or class is, and looks at its module's name to tell."""

    def know_our_classes(cls, model=None, model_class=None):
        asked = type(model) if model is not None else model_class
        if inspect.isclass(asked) and issubclass(asked, RopeEncDecPreTrainedModel):
            known = answer(asked)
            if known is not None:
                return known
        return infer(model=model, model_class=model_class)

    return classmethod(know_our_classes)


def _know_our_folders(infer):
    """`TasksManager._infer_task_from_model_name_or_path` refuses folders; ours say in their config what they are."""

    @functools.wraps(infer)
    def know_our_folders(cls, model_name_or_path, subfolder="", *args, **kwargs):
        file = Path(model_name_or_path, subfolder, "config.json")
        config = read_json(file) if file.is_file() else {}
        if config.get("model_type") == "rope_encdec_vision":
            raise ValueError(reads_images(model_name_or_path, "Optimum's export"))
        if config.get("model_type") == MODEL_TYPE:
            architecture = (config.get("architectures") or [None])[0]
            return _TASK_OF_CLASS.get(architecture, "text2text-generation")
        return infer(model_name_or_path, subfolder, *args, **kwargs)

    return classmethod(know_our_folders)


TasksManager._infer_library_from_model_or_model_class = _know_our_classes(
    TasksManager._infer_library_from_model_or_model_class, lambda asked: "transformers"
)
TasksManager._infer_task_from_model_or_model_class = _know_our_classes(
    TasksManager._infer_task_from_model_or_model_class, lambda asked: _TASK_OF_CLASS.get(asked.__name__)
)
TasksManager._infer_task_from_model_name_or_path = _know_our_folders(TasksManager._infer_task_from_model_name_or_path)
