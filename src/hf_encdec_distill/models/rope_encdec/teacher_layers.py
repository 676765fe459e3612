"""A decoder-only model's layers as those of a student: its config, and the tensors under the student's names."""

import logging

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import SUPPORTED_FAMILIES
from ..either_version import check_rope_is_read, rope_parameters
from ..families import biases_of, sliding_window_of
from .configuration_rope_encdec import RopeEncDecConfig
from .modeling_rope_encdec import RopeEncDecForConditionalGeneration, RopeEncDecRotaryEmbedding


logger = logging.getLogger(__name__)


def check_family(config) -> None:
    """Raises ValueError where a student cannot hold the layers of a teacher of this config."""
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}  # of 5.x and of 4.57
    if "mrope_section" in rope:
        raise ValueError(
            f"A teacher of model_type={config.model_type!r} has M-RoPE (mrope_section={rope['mrope_section']}), three "
            "positions for each token of an image, of which a student's layers know one: they cannot be its. Make the "
            f"student from a model of {', '.join(SUPPORTED_FAMILIES)}, and let this one teach it: DistillationTrainer "
            "takes it as teacher=."
        )
    if config.model_type not in SUPPORTED_FAMILIES:
        raise ValueError(
            f"A teacher of model_type={config.model_type!r} is not supported: its block has to be one of those that a "
            f"student can hold, {', '.join(SUPPORTED_FAMILIES)}."
        )
    check_rope_is_read(config)


def student_config(config, encoder_layers, decoder_layers, cross_attention, **fields) -> RopeEncDecConfig:
    """Of a student with these layers, numbered as in the decoder-only model that `config` is of."""
    family = config.model_type
    biases = biases_of(config)
    no_rope = [i for i, rope in enumerate(getattr(config, "no_rope_layers", None) or []) if not rope]
    kept_without_rope = {
        side: [position for position, layer in enumerate(layers) if layer in no_rope]
        for side, layers in (("encoder", encoder_layers), ("decoder", decoder_layers))
    }
    made = RopeEncDecConfig(
        **{
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "encoder_num_hidden_layers": len(encoder_layers),
            "decoder_num_hidden_layers": len(decoder_layers),
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            "hidden_act": config.hidden_act,
            "attention_bias": biases.attention,
            "mlp_bias": biases.mlp,
            "qk_norm": family == "qwen3",
            "rope_parameters": rope_parameters(config),
            "encoder_no_rope_layers": kept_without_rope["encoder"],
            "decoder_no_rope_layers": kept_without_rope["decoder"],
            "max_position_embeddings": fields.get("max_position_embeddings") or _max_positions(config),
            "rms_norm_eps": config.rms_norm_eps,
            "attention_dropout": config.attention_dropout,
            "initializer_range": config.initializer_range,
            "tie_word_embeddings": config.tie_word_embeddings,
            "cross_attention": cross_attention,
            "teacher_num_hidden_layers": config.num_hidden_layers,
            "attn_implementation": config._attn_implementation,
            **fields,
        }
    )
    if cross_attention == "merged" and made.cross_attention_layers is None:
        # The state that enters teacher layer d has passed every kept encoder layer below d.
        states = [sum(e < d for e in encoder_layers) for d in decoder_layers]
        made.cross_attention_layers = [states[first] for first in made.prompt_keys_of_decoder_layer]
    return made


def _max_positions(config) -> int:
    """Positions up to which the student is the teacher: within a sliding window, attention is full."""
    window = sliding_window_of(config)
    if window is None:
        return config.max_position_embeddings
    # RoPE of other types is scaled by it.
    becomes = rope_parameters(config).get("rope_type", "default") == "default"
    logger.warning(
        "The teacher attends within a sliding window of %d tokens, the student to all of them: it is exact up to "
        "that length%s.",
        window,
        ", which becomes its max_position_embeddings" if becomes else ": keep prompt and target together within it",
    )
    return window if becomes else config.max_position_embeddings


def load_layers(model_class, config, teacher, encoder_layers, decoder_layers, share_memory):
    """A model of `config` that holds the teacher's tensors, or copies of them."""
    state = _student_state(teacher, config, encoder_layers, decoder_layers)
    if not share_memory:
        state = {name: tensor.clone() for name, tensor in state.items()}
    with torch.device("meta"):
        student = model_class(config)
    missing, unexpected = student.load_state_dict(state, strict=False, assign=True)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(
            f"The teacher's tensors do not fit the student: missing {sorted(missing)}, unexpected "
            f"{sorted(unexpected)}."
        )
    device = next(iter(state.values())).device
    for side in (student.model.encoder, student.model.decoder):
        for name, module in side.named_children():
            if isinstance(module, RopeEncDecRotaryEmbedding):
                setattr(side, name, RopeEncDecRotaryEmbedding(module.config, device))
    student.tie_weights()
    return student.eval()


def _student_state(teacher, config, encoder_layers, decoder_layers) -> dict:
    """Student tensors by name, views of the teacher's. Phi-3's fused projections are split."""
    source = {name: tensor.detach() for name, tensor in teacher.state_dict().items()}
    state = {
        "model.encoder.embed_tokens.weight": source["model.embed_tokens.weight"],
        "model.encoder.norm.weight": source["model.norm.weight"],
        "model.decoder.norm.weight": source["model.norm.weight"],
    }
    if not config.tie_word_embeddings:
        state["lm_head.weight"] = source["lm_head.weight"]
    query_width = config.num_attention_heads * config.head_dim
    key_value_width = config.num_key_value_heads * config.head_dim
    blocks: dict[int, dict[str, Tensor]] = {}
    for name, tensor in source.items():
        if not name.startswith("model.layers."):
            continue
        layer, rest = name.removeprefix("model.layers.").split(".", 1)
        block = blocks.setdefault(int(layer), {})
        if "qkv_proj" in rest:
            parts = tensor.split([query_width, key_value_width, key_value_width])
            block.update({rest.replace("qkv_proj", f"{p}_proj"): part for p, part in zip("qkv", parts)})
        elif "gate_up_proj" in rest:
            parts = tensor.chunk(2)
            block.update({rest.replace("gate_up_proj", f"{p}_proj"): part for p, part in zip(("gate", "up"), parts)})
        elif "rotary_emb" not in rest:
            block[rest] = tensor
    for side, layers in (("encoder", encoder_layers), ("decoder", decoder_layers)):
        for position, layer in enumerate(layers):
            block = dict(blocks[layer])
            if side == "decoder" and config.cross_attention == "separate":
                shares = config.prompt_keys_of_decoder_layer[position] != position
                for rest, tensor in blocks[layer].items():
                    if shares and rest.startswith(("self_attn.k_", "self_attn.v_")):
                        continue
                    if rest.startswith("self_attn.o_proj"):
                        block[rest.replace("self_attn", "cross_attn")] = torch.zeros_like(tensor)
                    elif rest.startswith("self_attn."):
                        block[rest.replace("self_attn", "cross_attn")] = tensor
                block["cross_attn_layernorm.weight"] = block["input_layernorm.weight"]
            state.update({f"model.{side}.layers.{position}.{rest}": tensor for rest, tensor in block.items()})
    return state


# What a state of the encoder depends on besides weights.
_ENCODER_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "qk_norm",
    "rope_parameters",
    "max_position_embeddings",
    "rms_norm_eps",
    "encoder_pooling",
)


def encoder_is_first_layers_of(student, teacher) -> bool:
    """Whether a student's encoder layers are the teacher's first ones in all that its decoder reads, bit for bit.

    The embedding is not compared: a student with a trimmed vocabulary has other rows for the same tokens. A teacher
    with an adapter or quantised weights is another model than those that its layers came from.
    """
    config, depth = student.config, student.config.encoder_states_read[-1]
    if not isinstance(teacher, PreTrainedModel) or teacher.config.model_type not in SUPPORTED_FAMILIES:
        return False
    if depth > teacher.config.num_hidden_layers:
        return False
    layers = list(range(config.encoder_num_hidden_layers))
    of_teacher = student_config(teacher.config, layers, [0], "merged")
    without_rope = [layer for layer in of_teacher.encoder_no_rope_layers if layer < depth]
    if [layer for layer in config.encoder_no_rope_layers if layer < depth] != without_rope:
        return False
    if any(getattr(config, name) != getattr(of_teacher, name) for name in _ENCODER_FIELDS):
        return False
    if "sliding_attention" in config.attention_of_encoder_layer[:depth]:
        return False
    within = tuple(f"model.encoder.layers.{layer}." for layer in range(depth))
    ours, theirs = (
        {name: tensor for name, tensor in state.items() if name.startswith(within)}
        for state in (student.state_dict(), _student_state(teacher, of_teacher, list(range(depth)), []))
    )
    return set(ours) == set(theirs) and all(_same(tensor, theirs[name]) for name, tensor in ours.items())


def _same(one, other) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape or other.is_meta:
        return False
    return torch.equal(one, other.to(one.device))


def as_causal_encoder(model, layers=None, share_memory=True, windows=False):
    """Layers of a decoder-only model, all by default, as an encoder of ours.

    It attends in full, as students do, or with `windows` as the model itself.
    """
    of_model, fields = model.config, {"encoder_attention": "causal"}
    if layers is None:
        layers = list(range(of_model.num_hidden_layers))
    window = sliding_window_of(of_model)
    if windows and window is not None:
        types = getattr(of_model, "layer_types", None) or ["sliding_attention"] * of_model.num_hidden_layers
        fields["encoder_layer_types"] = [types[layer] for layer in layers]
        fields["encoder_sliding_window"] = window
        fields["max_position_embeddings"] = of_model.max_position_embeddings
    config = student_config(of_model, layers, layers[-1:], "merged", **fields)
    whole = load_layers(
        RopeEncDecForConditionalGeneration, config, model, layers, layers[-1:], share_memory=share_memory
    )
    return whole.model.encoder
