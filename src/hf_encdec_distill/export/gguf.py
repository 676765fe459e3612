"""GGUF for llama.cpp: `encoder.gguf` and `decoder.gguf`, two models of architectures that llama.cpp has already.

A `merged` decoder is a decoder-only model whose cache begins with the prompt. So the decoder is a plain Llama, and the
encoder is one whose cache holds the keys and values that the decoder reads: behind the layers that make an encoder
state stand layers that only project it, one for each decoder layer that reads it. llama.cpp keeps the keys and
values of such layers as those of all others. The decoder goes on from a copy of them.

What that takes in llama.cpp (0c1e570, which llama-cpp-python 0.3.36 builds): the architecture `deci` is a Llama whose
layers may each have their own heads and MLP width, and leaves the residual stream as it is where a layer has no MLP
(`src/models/deci.cpp`). `openelm` is the same with a norm over queries and keys (Qwen3's block), but wants an MLP in
each layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .backends import Backend, register_backend
from .graphs import GraphCache, Graphs, threads
from .llama_cpp import LlamaCpp, PromptState, quantize
from .recipe import Graph, Shapes


if TYPE_CHECKING:
    from torch import Tensor

ENCODER, DECODER = "encoder.gguf", "decoder.gguf"
# GGUF's name of the type of a variant's matrices; vectors are in F32.
_TYPES = {"fp32": "F32", "fp16": "F16", "int8": "Q8_0", "int4": "Q4_0"}
_FILE_TYPES = {"fp32": "ALL_F32", "fp16": "MOSTLY_F16", "int8": "MOSTLY_Q8_0", "int4": "MOSTLY_Q4_0"}
# As llama.cpp's own quantiser, which keeps a tied embedding finer than the layers: it is the head.
_EMBEDDING_TYPES = {**_TYPES, "int4": "Q8_0"}
_SOURCES = "hf_encdec_distill.encoder_layer_of_decoder_layer"
_START = "hf_encdec_distill.decoder_start_token_id"
_LEAST_MLP = 32  # width of an MLP of zeros, one block of a quantised row


@register_backend
class GgufBackend(Backend):
    name = "gguf"
    label = "GGUF"
    runtime = "llama.cpp"
    packages = ("llama_cpp", "gguf")
    variants = ("fp32", "fp16", "int8", "int4", "q4_k_m")
    files = (ENCODER, DECODER)

    def settle(
        self, config, variant: str, shapes: Shapes, stateful: bool | None, options: Mapping[str, Any]
    ) -> tuple[Shapes, bool]:
        """
        Raises:
            ValueError: fixed shapes or a stateless decoder are asked for, which llama.cpp does not have, or the
                architecture is none of its own.
        """
        if shapes.prompts is not None:
            raise ValueError(f"shapes {shapes}: gguf takes dynamic alone; leave --shapes out")
        if stateful is False:
            raise ValueError("llama.cpp keeps keys and values itself: leave stateless out, or choose onnx")
        if lacking := _lacking(config):
            raise ValueError(
                f"{lacking}: gguf is for Llama's, Qwen2's and Qwen3's block; onnx and openvino serve it "
                "(hf-encdec-distill export --target onnx)"
            )
        return shapes, True

    def cache_dtype(self, variant: str) -> str:
        return "float32" if variant == "fp32" else "float16"

    def export(
        self,
        model,
        graphs: Mapping[str, Graph],
        shapes: Shapes,
        variant: str,
        stateful: bool,
        folder: Path,
        license: str,
        options: Mapping[str, Any],
    ) -> None:
        if variant == "q4_k_m":  # which llama.cpp makes of a file; the package gguf does not
            self.export(model, graphs, shapes, "fp32", stateful, folder, license, options)
            for file in (ENCODER, DECODER):
                quantize(folder / file, "Q4_K_M")
            return
        decoder = model.model.decoder
        rows, sources = encoder_rows(model)
        writer = _Writer(folder / ENCODER, model, variant, license, rows, decoder.norm, has_head=False)
        # As text: llama.cpp hands no lists of the header out.
        writer.writer.add_string(_SOURCES, ",".join(map(str, sources)))
        if model.config.encoder_attention == "bidirectional":
            writer.writer.add_causal_attention(False)
        writer.write()
        layers = [_Row(layer, layer) for layer in decoder.layers]
        writer = _Writer(folder / DECODER, model, variant, license, layers, decoder.norm)
        writer.writer.add_string(_START, str(model.config.decoder_start_token_id))
        writer.write()

    def load(self, folder: Path, graphs: Mapping[str, Graph], shapes: Shapes, dtype, stateful: bool) -> GgufGraphs:
        return GgufGraphs(folder, graphs, shapes, dtype)

    def devices(self) -> list[str]:
        return ["CPU", "GPU"] if LlamaCpp.has_gpu() else ["CPU"]


class _Row:
    """A layer of a GGUF file: where its keys and values come from, and its queries and MLP, if it has any."""

    def __init__(self, reads, rest=None):
        self.reads, self.rest = reads, rest


def encoder_rows(model) -> tuple[list[_Row], list[int]]:
    """The layers of `encoder.gguf`, and for each decoder layer the one whose keys and values are its prompt's.

    A decoder layer whose norm, key and value projection are those of the encoder layer that begins at the state which
    it reads needs no row of its own: that layer's keys and values are the same.
    """
    from ..models.rope_encdec.prompt_keys import shared_prompt_keys

    config = model.config
    encoder, decoder = model.model.encoder.layers, model.model.decoder.layers
    with_encoder = {id(layer) for layer, _ in shared_prompt_keys(model)}
    rows: list[_Row] = []
    sources = [-1] * len(decoder)
    last = max(config.encoder_state_of_decoder_layer)
    projecting = dict.fromkeys(config.prompt_keys_of_decoder_layer)
    for state in range(last + 1):
        readers = [i for i in projecting if config.encoder_state_of_decoder_layer[i] == state]
        shared = [index for index in readers if id(decoder[index]) in with_encoder]
        for index in readers:
            if index not in shared:
                sources[index] = len(rows)
                rows.append(_Row(decoder[index]))
        if state < last or shared:
            for index in shared:
                sources[index] = len(rows)
            rows.append(_Row(encoder[state], encoder[state]))
    return rows, [sources[first] for first in config.prompt_keys_of_decoder_layer]


def _lacking(config) -> str:
    """What of a block no architecture of llama.cpp has; empty if nothing. The config is a student's or a decoder-only
    model's."""
    from ..models.either_version import rope_parameters
    from ..models.families import RULED_BY_LENGTH, biases_of, sliding_window_of

    parameters = rope_parameters(config)
    rope = parameters.get("rope_type", "default")
    problems = {
        "cross_attention 'separate', whose block llama.cpp lacks": getattr(config, "cross_attention", "merged")
        != "merged",
        f"hidden_act {config.hidden_act!r}": config.hidden_act not in ("silu", "swish"),
        "an encoder that pools": getattr(config, "encoder_pooling", 1) > 1,
        "an MLP without a gate": not getattr(config, "gated_mlp", True),
        "layers without RoPE": bool(
            getattr(config, "encoder_no_rope_layers", ()) or getattr(config, "decoder_no_rope_layers", ())
        ),
        "encoder layers with a sliding window": "sliding_attention"
        in getattr(config, "attention_of_encoder_layer", ()),
        "layers with a sliding window": sliding_window_of(config) is not None,
        "RoPE on a part of each head": parameters.get("partial_rotary_factor", 1.0) != 1.0,
        f"RoPE of type {rope!r}, whose frequencies depend on the length": rope in RULED_BY_LENGTH,
        f"RoPE of type {rope!r} with qk_norm": _has_qk_norm(config) and rope not in ("default", "linear"),
        "biases with qk_norm": _has_qk_norm(config) and any(biases_of(config)),
    }
    return " and ".join(problem for problem, holds in problems.items() if holds)


def _has_qk_norm(config) -> bool:
    return getattr(config, "qk_norm", config.model_type == "qwen3")


class _Writer:
    """One GGUF file.

    Args:
        model: gives config, embedding, head, RoPE and tokenizer.
        rows: its layers.
        final_norm: the norm before the head.
        has_head: whether logits are asked for.
    """

    def __init__(self, path: Path, model, variant: str, license: str, rows: Sequence[_Row], final_norm, has_head=True):
        import gguf

        from ..models.either_version import rope_parameters

        self.config, self.variant, self.width = model.config, variant, rows[0].reads.self_attn.head_dim
        config = model.config
        qk_norm = _has_qk_norm(config)
        # Rows that only project need an architecture whose layers each have a width of their own.
        partial = any(row.rest is None for row in rows)
        self.architecture = {(False, False): "llama", (True, False): "deci", (False, True): "qwen3"}.get(
            (partial, qk_norm), "openelm"
        )
        # llama.cpp rotates neighbours in these, halves in the others.
        self.permuted = self.architecture in ("llama", "deci")
        self.writer = writer = gguf.GGUFWriter(path, self.architecture)
        writer.add_license(license)
        writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[variant]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_block_count(len(rows))
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_vocab_size(config.vocab_size)
        writer.add_key_length(self.width)
        writer.add_value_length(self.width)
        writer.add_rope_dimension_count(self.width)
        self.rope = rope_parameters(config)
        writer.add_rope_freq_base(self.rope["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        self._add_widths(rows)
        _add_tokenizer(writer, model)
        self._add_rope(model)
        embedding = model.get_input_embeddings().weight
        self._add("token_embd.weight", embedding, _EMBEDDING_TYPES[variant])
        self._add("output_norm.weight", final_norm.weight)
        if has_head and not config.tie_word_embeddings:
            self._add("output.weight", model.get_output_embeddings().weight, _EMBEDDING_TYPES[variant])
        for index, row in enumerate(rows):
            self._add_row(index, row)

    def write(self) -> None:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()

    def _add_widths(self, rows: Sequence[_Row]) -> None:
        config, writer = self.config, self.writer
        heads = [config.num_key_value_heads if row.rest is None else config.num_attention_heads for row in rows]
        # `deci` takes layers without an MLP. Its last one has to have one: there the state is cut down to the
        # positions whose logits are asked for, which are none.
        least = [0 if self.architecture == "deci" else _LEAST_MLP] * len(rows)
        least[-1] = _LEAST_MLP
        mlps = [
            width if row.rest is None else row.rest.mlp.up_proj.out_features
            for row, width in zip(rows, least, strict=True)
        ]
        self.mlps = mlps
        if self.architecture in ("deci", "openelm"):
            writer.add_head_count(heads)
            writer.add_head_count_kv([config.num_key_value_heads] * len(rows))
            writer.add_feed_forward_length(mlps)
        else:
            writer.add_head_count(config.num_attention_heads)
            writer.add_head_count_kv(config.num_key_value_heads)
            writer.add_feed_forward_length(mlps[0])

    def _add_rope(self, model) -> None:
        """RoPE of any type whose frequencies do not depend on the length, as factors of the plain frequencies."""
        import torch

        rotary = _rotary(model)
        inv_freq, scaling = rotary.inv_freq.double().cpu(), float(rotary.attention_scaling)
        width = self.width
        plain = 1 / self.rope["rope_theta"] ** (torch.arange(0, width, 2).double() / width)
        factors = plain / inv_freq
        if self.architecture in ("qwen3", "openelm"):
            if self.rope.get("rope_type") == "linear":
                import gguf

                self.writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
                self.writer.add_rope_scaling_factor(float(factors[0]))
            return
        if not torch.allclose(factors, torch.ones_like(factors), rtol=1e-5):
            self._add("rope_freqs.weight", factors.float())
        if scaling != 1.0:
            self.writer.add_rope_scaling_attn_factors(scaling)

    def _add_row(self, index: int, row: _Row) -> None:
        import torch

        config, name = self.config, f"blk.{index}"
        attention = row.reads.self_attn
        self._add(f"{name}.attn_norm.weight", row.reads.input_layernorm.weight)
        heads = config.num_attention_heads if row.rest is not None else config.num_key_value_heads
        query = {"weight": torch.zeros(heads * self.width, config.hidden_size)}
        output = {"weight": torch.zeros(config.hidden_size, heads * self.width)}
        biased = getattr(attention.k_proj, "bias", None) is not None
        if row.rest is not None:
            query, output = (_parameters(module) for module in (attention.q_proj, attention.o_proj))
        elif biased:
            query["bias"] = torch.zeros(heads * self.width)
        projections = {
            "attn_q": query,
            "attn_k": _parameters(attention.k_proj),
            "attn_v": _parameters(attention.v_proj),
        }
        if self.permuted:
            for part in ("attn_q", "attn_k"):
                projections[part] = {
                    kind: _neighbours(tensor, self.width) for kind, tensor in projections[part].items()
                }
        if self.architecture == "openelm":
            joined = torch.cat([projections[part]["weight"] for part in ("attn_q", "attn_k", "attn_v")])
            projections = {"attn_qkv": {"weight": joined}}
        projections["attn_output"] = output
        if _has_qk_norm(config):
            self._add(f"{name}.attn_k_norm.weight", attention.k_norm.weight)
            self._add(f"{name}.attn_q_norm.weight", attention.q_norm.weight)
        width = self.mlps[index]
        if row.rest is not None:
            mlp = row.rest.mlp
            self._add(f"{name}.ffn_norm.weight", row.rest.post_attention_layernorm.weight)
            for part, module in (("ffn_gate", mlp.gate_proj), ("ffn_up", mlp.up_proj), ("ffn_down", mlp.down_proj)):
                projections[part] = _parameters(module)
        elif width:
            self._add(f"{name}.ffn_norm.weight", torch.ones(config.hidden_size))
            nothing = torch.zeros(width, config.hidden_size)
            projections |= {"ffn_gate": {"weight": nothing}, "ffn_up": {"weight": nothing}}
            projections["ffn_down"] = {"weight": nothing.T}
        for part, tensors in projections.items():
            for kind, tensor in tensors.items():
                self._add(f"{name}.{part}.{kind}", tensor, _TYPES[self.variant] if kind == "weight" else "F32")

    def _add(self, name: str, tensor: Tensor, kind: str = "F32") -> None:
        import gguf

        array = tensor.detach().float().cpu().contiguous().numpy()
        stored = gguf.GGMLQuantizationType[kind]
        block, _ = gguf.GGML_QUANT_SIZES[stored]
        if array.shape[-1] % block:
            stored = gguf.GGMLQuantizationType.F16  # as llama.cpp's quantiser: rows are cut into whole blocks
        self.writer.add_tensor(name, gguf.quants.quantize(array, stored), raw_dtype=stored)


def _rotary(model):
    return model.model.decoder.rotary_emb if hasattr(model.model, "decoder") else model.model.rotary_emb


def _parameters(module) -> dict[str, Tensor]:
    return dict(module.named_parameters())


def _neighbours(tensor: Tensor, width: int) -> Tensor:
    """Rows of a projection in llama.cpp's order: the two features that RoPE turns together stand side by side."""
    heads = tensor.shape[0] // width
    return tensor.reshape(heads, 2, width // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _halves(array: np.ndarray) -> np.ndarray:
    """Keys `(..., D)` in llama.cpp's order to ours."""
    return array.reshape(*array.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(array.shape)


def _from_halves(array: np.ndarray) -> np.ndarray:
    return array.reshape(*array.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(array.shape)


# What a byte-level BPE does with a text first -> llama.cpp's name for it.
_PRE_TOKENIZERS = (
    ("Digits", "smollm"),
    (r"\p{N}{1,3}", "llama-bpe"),
    (r"\p{N}|", "qwen2"),
)


def _add_tokenizer(writer, model) -> None:
    """The vocabulary, so that llama.cpp can say what a token is. Prompts are encoded by the student's own tokenizer,
    which has the template built in."""
    import gguf

    tokenizer = getattr(model, "tokenizer", None)
    backend = getattr(tokenizer, "backend_tokenizer", None)  # a slow one has none
    content = {} if backend is None else json.loads(backend.to_str())
    decoder = json.dumps(content.get("decoder"))
    if content.get("model", {}).get("type") != "BPE" or "ByteLevel" not in decoder:
        writer.add_tokenizer_model("no_vocab")
        return
    vocabulary = content["model"]["vocab"]
    added = {token["content"]: token for token in content["added_tokens"]}
    unused = "unused"
    while any(text.startswith(f"[{unused}") for text in (*vocabulary, *added)):
        unused += "_"  # llama.cpp ends the process where two tokens have one name
    tokens = [f"[{unused}{index}]" for index in range(model.config.vocab_size)]
    kinds = [int(gguf.TokenType.UNUSED)] * len(tokens)
    for text, index in vocabulary.items():
        if index < len(tokens):
            tokens[index], kinds[index] = text, int(gguf.TokenType.NORMAL)
    for text, token in added.items():
        if token["id"] >= len(tokens):
            continue
        kind = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        tokens[token["id"]], kinds[token["id"]] = text, int(kind)
    before = json.dumps(content.get("pre_tokenizer"), ensure_ascii=False).replace("\\\\", "\\")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(next((name for mark, name in _PRE_TOKENIZERS if mark in before), "default"))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = content["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    eos = model.generation_config.eos_token_id
    ends = [] if eos is None else eos if isinstance(eos, list) else [eos]
    # Each of the three ends an answer for llama.cpp; there is no place for a fourth.
    for add, end in zip((writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), ends):
        add(end)
    writer.add_add_bos_token(False)


def write_decoder_only(model, path: Path, variant: str) -> None:
    """Write a decoder-only model of transformers with a Llama's, Qwen2's or Qwen3's block as one GGUF file.

    Raises:
        ValueError: the block is another, or one that llama.cpp lacks.
    """
    config = model.config
    if config.model_type not in ("llama", "mistral", "qwen2", "qwen3"):
        raise ValueError(f"a {config.model_type} cannot be written as GGUF here: llama, mistral, qwen2 and qwen3 can")
    if lacking := _lacking(config):
        raise ValueError(f"{lacking}: llama.cpp has no architecture with such a block")
    rows = [_Row(layer, layer) for layer in model.model.layers]
    _Writer(path, model, variant, "unknown", rows, model.model.norm).write()


class LlamaCache(GraphCache):
    """The sequences of one generation: row i is sequence `order[i]` of the decoder's context."""

    def __init__(self, batch: int):
        super().__init__([[]])
        self.order = list(range(batch))

    def reorder_cache(self, beam_idx) -> None:
        self.order = [self.order[index] for index in np.asarray(beam_idx)]


def _sources(encoder: LlamaCpp, graphs: Mapping[str, Graph]) -> list[int]:
    """
    Raises:
        ValueError: the encoder does not say for each decoder layer which layer's keys and values it reads.
    """
    said = encoder.metadata(_SOURCES) or ""
    sources = [int(part) if part.isdecimal() else -1 for part in said.split(",")]
    layers = len(graphs["encoder"].outputs) // 2
    if len(sources) != layers or not all(0 <= source < encoder.layers for source in sources):
        raise ValueError(
            f"{encoder.path} has {_SOURCES}={said!r}, expected {layers} numbers below {encoder.layers}: export the "
            "model again"
        )
    return sources


class GgufGraphs(Graphs):
    """An exported folder on llama.cpp. The decoder's context holds one generation at a time."""

    def __init__(self, folder: Path, graphs: Mapping[str, Graph], shapes: Shapes, dtype):
        super().__init__(graphs, shapes, dtype)
        self.encoder = LlamaCpp(folder / ENCODER, threads(), dtype, flash=self.dtype == np.float16)
        self.decoder = LlamaCpp(folder / DECODER, threads(), dtype, flash=False)
        self.sources = _sources(self.encoder, graphs)
        self.permuted = self.decoder.metadata("general.architecture") == "llama"
        _, self.heads, _, self.width = graphs["encoder"].outputs[0].shape({"batch": 1, "prompt": 1})
        self._running: LlamaCache | None = None

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        assert graph == "encoder"  # the decoder has states of its own: `decode`
        batch, length = inputs["input_ids"].shape
        outputs = [np.zeros((batch, self.heads, length, self.width), self.dtype) for _ in range(2 * len(self.sources))]
        for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
            real = np.flatnonzero(mask)
            if not len(real):
                continue
            self.encoder.clear()
            self.encoder.evaluate([(0, position, int(ids[column]), False) for position, column in enumerate(real)])
            state = self.encoder.state(0)
            for layer, source in enumerate(self.sources):
                for side, rows in enumerate((state.keys[source], state.values[source])):
                    tensor = rows.reshape(len(real), self.heads, self.width).swapaxes(0, 1)
                    if side == 0 and self.permuted:
                        tensor = _halves(tensor)
                    outputs[2 * layer + side][row][:, real] = tensor
        return outputs

    def new_cache(self, batch: int) -> GraphCache:
        return LlamaCache(batch)

    def decode(self, input_ids, encoder_mask, cross, cache) -> np.ndarray:
        """
        Raises:
            ValueError: another generation has begun on the decoder's context.
        """
        lengths = encoder_mask.sum(-1)
        if cache.length == 0:
            self._begin(encoder_mask, cross, cache)
        elif self._running is not cache:
            raise ValueError(
                "another generation has begun on this decoder: end one before the other, or load it twice"
            )
        self._settle(cache)
        tokens = [
            (cache.order[row], int(lengths[row]) + cache.length + step, int(token), True)
            for row, of_row in enumerate(input_ids)
            for step, token in enumerate(of_row)
        ]
        logits = self.decoder.evaluate(tokens)
        cache.length += input_ids.shape[1]
        return logits.reshape(*input_ids.shape, -1)

    def _begin(self, encoder_mask, cross, cache: LlamaCache) -> None:
        self._running = cache
        cache.order = list(range(len(encoder_mask)))
        self.decoder.clear(sequences=2 * len(encoder_mask))
        for row, mask in enumerate(encoder_mask):
            real = np.flatnonzero(mask)
            if not len(real):
                continue
            tensors = [np.ascontiguousarray(array[row][:, real].swapaxes(0, 1)) for array in cross]
            keys = [_from_halves(key) if self.permuted else key for key in tensors[::2]]
            self.decoder.set_state(
                row,
                PromptState(
                    [key.reshape(len(real), -1) for key in keys],
                    [value.reshape(len(real), -1) for value in tensors[1::2]],
                ),
            )

    def _settle(self, cache: LlamaCache) -> None:
        """Copies of sequences where beams go on from the same one: the free half of them takes the new order."""
        batch = len(cache.order)
        if sorted(cache.order) == list(range(batch)) or sorted(cache.order) == list(range(batch, 2 * batch)):
            return
        first = 0 if min(cache.order) >= batch else batch
        self.decoder.copy_sequences({first + row: source for row, source in enumerate(cache.order)})
        cache.order = list(range(first, first + batch))
