"""Microsoft's Mu ("Return of the Encoder", arXiv 2501.16273, section 3) in our architecture.

Written against github.com/microsoft/encoder-decoder-slm at b306bae: `src/mu/models/modeling_mu.py`, `mu_utils.py` and
`src/mu/checkpoint.py`. Evaluated on the same padded batch, the two give the same logits. What to know:

- Mu takes id 0 as padding wherever it stands; ours wants `attention_mask` (and `decoder_attention_mask` where a target
  holds pads before real tokens), as every transformers model does.
- Mu shares key/value heads in one of two orders. Ours has one, the interleaved one of Llama, so the other is folded
  into the weights by moving query heads.
- Mu's encoder counts positions from the middle. RoPE sees only distances, so ours counts from 0.
- With `rope_factor > 1` Mu scales RoPE once a sequence is longer than `block_size`; up to there the factor changes
  nothing. The length is that of the padded batch, each side by itself: transformers' "dynamic" type. Mu keeps no
  cache and turns all keys again at each step; to match it past `block_size`, generate with `use_cache=False`.
- In training Mu drops out attention probabilities and the output of each MLP. Ours keeps the first,
  `attention_dropout`, and has no second.
- The tokenizer isn't in the checkpoint: it is Phi-3.5-mini's, with `<s>` (1) to start, `<|endoftext|>` (32000) to end
  and `<unk>` (0) as padding, on the right.
- The vision variant (`mu_v2`) can't be held: the LM head of its text tower has a bias.
"""

import os
from pathlib import Path
from typing import Any

import torch

from ...files import read_json, what_it_is
from .configuration_rope_encdec import RopeEncDecConfig
from .modeling_rope_encdec import RopeEncDecForConditionalGeneration


# The fields of Mu's configuration and their defaults. `qkv_embd` may be None, which stands for `n_embd`.
_MU_DEFAULTS = {
    "n_encoder_layer": 20,
    "n_decoder_layer": 10,
    "n_embd": 1024,
    "qkv_embd": 384,
    "is_interleaved": False,
    "hidden_dim": 4096,
    "n_head": 6,
    "n_kv_head": 3,
    "block_size": 1024,
    "dropout": 0.1,
    "rope_theta": 10000,
    "rope_factor": 1.0,
    "pad_token_id": 0,
    "vocab_size": 32128,
}
_MU_TYPES: dict[str, type | tuple[type, ...]] = {
    "is_interleaved": bool,
    **dict.fromkeys(("dropout", "rope_theta", "rope_factor"), (int, float)),
}

# Ours on the left, Mu's on the right.
_ENCODER_LAYER = {
    "input_layernorm": "ln1",
    "self_attn": "attn",
    "post_attention_layernorm": "ln2",
    "mlp": "mlp",
}
_DECODER_LAYER = {
    "input_layernorm": "ln1",
    "self_attn": "causal_attn",
    "cross_attn_layernorm": "ln2",
    "cross_attn": "cross_attn",
    "post_attention_layernorm": "ln3",
    "mlp": "mlp",
}
_LINEAR = {
    "q_proj": "q_linear",
    "k_proj": "k_linear",
    "v_proj": "v_linear",
    "o_proj": "out_linear",
    "up_proj": "fc1",
    "down_proj": "fc2",
}


def convert_mu_checkpoint(
    checkpoint_path: str | os.PathLike,
    config_path: str | os.PathLike | None = None,
    *,
    bos_token_id: int = 1,
    eos_token_id: int = 32000,
) -> RopeEncDecForConditionalGeneration:
    """Read a Mu checkpoint and return the model that computes the same, in eval mode and in the checkpoint's dtype.

    Args:
        checkpoint_path: Mu's `.pt`: `{"model_state_dict": ..., "model_config": ...}` as its training writes it, or a
            bare state dict. It is read with `weights_only=True`.
        config_path: JSON with fields of Mu's configuration. Fields that it leaves out come from the checkpoint's
            `model_config`, and from Mu's defaults (the 332 M model) where that has none either.
        bos_token_id: Token that the decoder starts from; Mu's callers pass that of Phi-3.5-mini, 1.
        eos_token_id: Token that ends a target; Phi-3.5-mini's `<|endoftext|>`, 32000.

    Returns:
        [`RopeEncDecForConditionalGeneration`]; see the head of this module for how it is used and where it differs.

    Raises:
        ValueError: if a file can't be read as what it should be; if the two configurations contradict each other or a
            field is unknown or can't work; if tensors are missing, unknown or misshapen; if the checkpoint is the
            vision variant. The message names the field or the tensors.
    """
    tensors, recorded_fields = _read_checkpoint(Path(checkpoint_path))
    given_fields = {} if config_path is None else read_json(Path(config_path))
    if "lm_head.bias" in tensors or "model_type" in given_fields:
        raise ValueError(
            f"{checkpoint_path if 'lm_head.bias' in tensors else config_path} belongs to the vision variant of Mu "
            "(mu_v2), whose LM head has a bias (lm_head.bias) that this architecture can't hold. Convert the text "
            "model instead (class Mu of src/mu/models/modeling_mu.py, artifacts/models/model.pt)."
        )
    fields = _merge_fields(given_fields, recorded_fields, str(config_path), str(checkpoint_path))
    config = _our_config(fields, bos_token_id, eos_token_id)
    with torch.device("meta"):
        shapes = {
            name: tensor.shape for name, tensor in RopeEncDecForConditionalGeneration(config).state_dict().items()
        }
    _check_tensors(tensors, {_mu_name(name): shape for name, shape in shapes.items()}, str(checkpoint_path))

    state_dict = {name: tensors[_mu_name(name)] for name in shapes if name != "lm_head.weight"}
    if not fields["is_interleaved"]:
        state_dict = {name: _untile(name, tensor, config) for name, tensor in state_dict.items()}
    return RopeEncDecForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=state_dict, dtype=state_dict["model.encoder.embed_tokens.weight"].dtype
    )


def _read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors by Mu's names, and the `model_config` recorded beside them (empty if there is none)."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what a damaged pickle raises may be anything
        # Not torch's own message: it recommends `weights_only=False`.
        mend = what_it_is(path) or (
            "it is damaged, or holds Python objects besides tensors and plain values, which are not loaded"
        )
        raise ValueError(f"{path} can't be read as a PyTorch checkpoint: {mend}.") from error
    recorded_fields: dict[str, Any] = {}
    if isinstance(checkpoint, dict) and "model_state_dict" in checkpoint:
        recorded_fields = checkpoint.get("model_config") or {}
        if not isinstance(recorded_fields, dict):
            raise ValueError(f"{path} has the model_config {recorded_fields!r}, expected a dict of Mu's fields.")
        checkpoint = checkpoint["model_state_dict"]
    if not isinstance(checkpoint, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in checkpoint.values()):
        raise ValueError(
            f"{path} holds {type(checkpoint).__name__}, expected a dict of tensors, or a dict with one under "
            '"model_state_dict" as Mu\'s training writes it.'
        )
    return dict(checkpoint), recorded_fields


def _merge_fields(given: dict, recorded: dict, given_by: str, recorded_by: str) -> dict:
    """One value for each field of Mu's configuration."""
    for fields, source in ((given, given_by), (recorded, recorded_by)):
        unknown = sorted(fields.keys() - _MU_DEFAULTS.keys())
        if unknown:
            raise ValueError(f"{source}: unknown fields {unknown}; Mu's configuration has {sorted(_MU_DEFAULTS)}.")
        for name, value in fields.items():
            stands_for_n_embd = name == "qkv_embd" and value is None
            if not stands_for_n_embd and not isinstance(value, _MU_TYPES.get(name, int)):
                raise ValueError(
                    f"{source}: {name}={value!r} has the wrong type; Mu's default is {_MU_DEFAULTS[name]!r}."
                )
    merged = {**_MU_DEFAULTS, **recorded, **given}
    for name in given.keys() & recorded.keys():
        values = [merged["n_embd"] if value is None else value for value in (given[name], recorded[name])]
        if values[0] != values[1]:
            raise ValueError(
                f"{name}: {given_by} says {given[name]!r}, but the checkpoint {recorded_by} was made with "
                f"{recorded[name]!r}. Correct the JSON file, or convert without it."
            )
    if merged["qkv_embd"] is None:
        merged["qkv_embd"] = merged["n_embd"]
    if merged["n_head"] < 1 or merged["qkv_embd"] % merged["n_head"]:
        raise ValueError(f"n_head={merged['n_head']} has to divide qkv_embd={merged['qkv_embd']}.")
    return merged


def _our_config(fields: dict, bos_token_id: int, eos_token_id: int) -> RopeEncDecConfig:
    for name, token in (("bos_token_id", bos_token_id), ("eos_token_id", eos_token_id)):
        if not 0 <= token < fields["vocab_size"]:
            raise ValueError(
                f"{name}={token} is not in the vocabulary of {fields['vocab_size']} tokens; pass the {name} of the "
                "tokenizer that this checkpoint was trained with."
            )
    rope_parameters = {"rope_type": "default", "rope_theta": float(fields["rope_theta"])}
    if fields["rope_factor"] > 1:  # as in Mu, smaller factors change nothing
        rope_parameters.update(rope_type="dynamic", factor=float(fields["rope_factor"]))
    return RopeEncDecConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["n_embd"],
        intermediate_size=fields["hidden_dim"],
        encoder_num_hidden_layers=fields["n_encoder_layer"],
        decoder_num_hidden_layers=fields["n_decoder_layer"],
        num_attention_heads=fields["n_head"],
        num_key_value_heads=fields["n_kv_head"],
        head_dim=fields["qkv_embd"] // fields["n_head"],
        hidden_act="gelu_pytorch_tanh",
        gated_mlp=False,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=rope_parameters,
        max_position_embeddings=fields["block_size"],
        rms_norm_eps=1e-6,
        attention_dropout=fields["dropout"],
        tie_word_embeddings=True,
        cross_attention="separate",
        encoder_attention="bidirectional",
        pad_token_id=fields["pad_token_id"],
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        decoder_start_token_id=bos_token_id,
    )


def _mu_name(name: str) -> str:
    """`model.decoder.layers.3.self_attn.q_proj.bias` -> `transformer.h.3.causal_attn.q_linear.bias`"""
    parts = name.split(".")
    if parts[0] == "lm_head":
        return name
    _, side, *parts = parts
    if parts[0] == "embed_tokens":
        return "transformer.wte.weight"
    if parts[0] == "norm":
        return f"transformer.{'ln_e' if side == 'encoder' else 'ln_f'}.weight"
    _, layer, module, *parts = parts
    stack, modules = ("e", _ENCODER_LAYER) if side == "encoder" else ("h", _DECODER_LAYER)
    return ".".join(["transformer", stack, layer, modules[module], *(_LINEAR.get(part, part) for part in parts)])


def _check_tensors(tensors: dict[str, torch.Tensor], shapes: dict[str, torch.Size], source: str):
    """Hold the checkpoint's tensors against `shapes`, both under Mu's names."""
    problems = []
    missing = sorted(shapes.keys() - tensors.keys() - {"lm_head.weight"})  # the head may be left to the embedding
    unknown = sorted(tensors.keys() - shapes.keys())
    misshapen = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    for what, names in (("missing", missing), ("unknown", unknown), ("misshapen", misshapen)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            problems.append(f"{what} tensors: {', '.join(names[:5])}{more}")
    if problems:
        raise ValueError(
            f"{source} does not fit its configuration: {'; '.join(problems)}. Give its own with config_path."
        )
    head = tensors.get("lm_head.weight")
    if head is not None and not torch.equal(head, tensors["transformer.wte.weight"]):
        raise ValueError(
            f"{source}: lm_head.weight differs from transformer.wte.weight, but Mu's head is its embedding."
        )


def _untile(name: str, tensor: torch.Tensor, config: RopeEncDecConfig) -> torch.Tensor:
    """Move query heads so that head `j` finds its key/value head at `j // groups` instead of at `j % kv_heads`."""
    parts = name.split(".")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    order = torch.arange(heads).view(heads // kv_heads, kv_heads).T.flatten()
    if "q_proj" in parts:  # rows of the weight, entries of the bias
        return tensor.unflatten(0, (heads, -1))[order].flatten(0, 1)
    if parts[-2:] == ["o_proj", "weight"]:  # columns
        return tensor.unflatten(1, (heads, -1))[:, order].flatten(1, 2)
    return tensor
