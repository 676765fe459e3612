"""What a model costs, counted from its config (parameters, FLOPs, bytes, cache), against a decoder-only model.

Symbols used in the formulas below (batch 1, tokens as the unit of every length):

    h, m, V       hidden size, MLP width (each side its own), vocabulary
    H, K, d       query heads, key/value heads, width of a head (grouped-query attention: K <= H)
    P, N          tokens of the decoder-only model's prompt, tokens generated
    E             tokens that the encoder reads: P for `separate`, P - 1 for `merged` (the prompt's last token is the
                  decoder's start token)
    q = h*H*d,  kv = 2*h*K*d,  o = H*d*h,  f = 3*h*m (gated) or 2*h*m      elements of a block's matrices
    a(s, t) = 4*s*t*H*d     FLOPs of attention with s queries over t keys: scores and their product with the values

A multiply and an add are two FLOPs; biases, norms, activations, softmax, RoPE and embedding look-ups are left out, as
in `torch.utils.flop_counter`, which the tests hold these numbers against. Attention over a prompt is counted in full,
a(P, P): a dense kernel computes the masked half too; a kernel that skips it saves at most half of that term, which is
therefore reported apart (`first_token_attention_flops`). In an encoder layer that slides, a query has the keys of its
window, w or, in a bidirectional encoder, 2*w - 1: a kernel has to skip the others, as flash and flex attention do. The
sliding windows of a decoder-only model are counted as full attention.

Sources: arXiv 2501.16273 section 3 (the encoder-decoder split), 2410.03960 (prompt keys and values from an earlier
layer, which is where `merged` saves).
"""

import dataclasses

import torch
from transformers import AutoConfig

from . import SUPPORTED_FAMILIES
from .families import biases_of


@dataclasses.dataclass(frozen=True)
class Block:
    """Sizes of one transformer block, in elements; the names follow the module docstring."""

    h: int
    m: int
    H: int
    K: int
    d: int
    gated: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool

    @property
    def q(self) -> int:
        return self.h * self.H * self.d

    @property
    def kv(self) -> int:
        return 2 * self.h * self.K * self.d

    @property
    def o(self) -> int:
        return self.H * self.d * self.h

    @property
    def f(self) -> int:
        return (3 if self.gated else 2) * self.h * self.m

    @property
    def matrices(self) -> int:
        return self.q + self.kv + self.o + self.f

    @property
    def query_extras(self) -> int:
        """Vectors that the query and output side of one attention adds: biases and the norm over a query head."""
        return self.qkv_bias * self.H * self.d + self.output_bias * self.h + self.qk_norm * self.d

    @property
    def key_extras(self) -> int:
        """Vectors that the key/value side of one attention adds."""
        return self.qkv_bias * 2 * self.K * self.d + self.qk_norm * self.d

    @property
    def parameters(self) -> int:
        """A block of self-attention and MLP, each behind an RMSNorm of h."""
        mlp_bias = self.mlp_bias * ((2 if self.gated else 1) * self.m + self.h)
        return self.matrices + self.query_extras + self.key_extras + mlp_bias + 2 * self.h

    def attention(self, queries: float, keys: float) -> float:
        return 4 * queries * keys * self.H * self.d


def model_block(config) -> Block:
    """Of a decoder, or of a decoder-only model."""
    family = config.model_type
    if family != "rope_encdec" and family not in SUPPORTED_FAMILIES:
        raise ValueError(
            f"cannot count the cost of model_type {family!r}: the formulas hold for 'rope_encdec' and for the "
            f"decoder-only families {', '.join(SUPPORTED_FAMILIES)}; pass a model or config of one of these"
        )
    biases = biases_of(config)
    return Block(
        h=config.hidden_size,
        m=getattr(config, "decoder_intermediate_size", config.intermediate_size),
        H=config.num_attention_heads,
        K=config.num_key_value_heads,
        d=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        gated=getattr(config, "gated_mlp", True),
        qkv_bias=bool(biases.attention),
        output_bias=biases.attention is True,
        mlp_bias=biases.mlp,
        qk_norm=getattr(config, "qk_norm", family == "qwen3"),
    )


@dataclasses.dataclass(frozen=True)
class ModelCost:
    """Cost of one request at batch 1. FLOPs and parameters are counts, bytes are those of the dtype that was given.

    Attributes:
        kind: `"encoder-decoder"` or `"decoder-only"`.
        parameters: `embedding`, `encoder`, `decoder`, `head` (0 where it is tied to the embedding) and their `total`.
        first_token_flops: from the prompt to the logits of the first token, the head at one position only.
        first_token_attention_flops: the part of it that is attention over the prompt, quadratic in its length.
        flops_per_token: mean over the N - 1 decode steps after the first token.
        bytes_per_token: `weight_bytes_per_token + cache_bytes_per_token`, what a decode step has to read.
        weight_bytes_per_token: weights that a decode step touches, the head whole and one row of the embedding.
        cache_bytes_per_token: keys and values that a decode step reads, mean over the same N - 1 steps.
        kv_cache_bytes: the cache when the last token has been chosen, prompt side included.
    """

    kind: str
    parameters: dict[str, int]
    first_token_flops: int
    first_token_attention_flops: int
    flops_per_token: float
    bytes_per_token: float
    weight_bytes_per_token: int
    cache_bytes_per_token: float
    kv_cache_bytes: int

    def to_dict(self) -> dict:
        """The same numbers as plain JSON values."""
        return dataclasses.asdict(self)


def model_cost(
    model_or_config, prompt_length: int, new_tokens: int = 32, dtype: torch.dtype = torch.bfloat16
) -> ModelCost:
    """Counts what one request of `prompt_length` tokens in and `new_tokens` out costs at batch 1.

    Decoder-only, L layers, every step i = 1 ... N-1 after the first token reading P + i keys:

        first token   L * (2*P*(q+kv+o+f) + a(P, P)) + 2*V*h
        step          L * (2*(q+kv+o+f) + a(1, P + i)) + 2*V*h
        cache         L * 2*K*d * (P + N - 1) elements

    Encoder-decoder, A encoder and B decoder layers, without windows; the decoder begins with its start token, so that
    step i has i + 1 keys of its own; keys and values of the prompt are made once per request, B * 2*E*kv. Where the
    encoder pools by n, ceil(E / n) takes the place of E in the layers above and in all that the decoder reads. Where
    s decoder layers share keys and values of the prompt, ceil(B / s) layers make and cache them:

        merged        one softmax over [prompt, own keys]
            first token   A * (2*E*(q+kv+o+f) + a(E, E)) + B * (2*E*kv + 2*(q+kv+o+f) + a(1, E + 1)) + 2*V*h
            step          B * (2*(q+kv+o+f) + a(1, E + i + 1)) + 2*V*h
        separate      a cross-attention block beside the decoder's self-attention; its k and v run over the prompt only
            first token   A * (2*E*(q+kv+o+f) + a(E, E)) + B * (2*E*kv + 2*(2*q+kv+2*o+f) + a(1, 1) + a(1, E)) + 2*V*h
            step          B * (2*(2*q+kv+2*o+f) + a(1, i + 1) + a(1, E)) + 2*V*h
        cache         B * 2*K*d * (E + N) elements, either kind; with s, 2*K*d * (ceil(B / s) * E + B * N)

    A decode step reads each weight of the decoder once (not the cross k and v of `separate`), the head (V*h), one row
    of the embedding (h), and every key and value that it attends to.

    Args:
        model_or_config: a `rope_encdec` or Llama-like decoder-only model, or its config. Only the config is read.
        prompt_length: P, tokens that the decoder-only model reads before its first new token; at least 2.
        new_tokens: N, tokens generated; at least 2, so that there is a decode step to speak of.
        dtype: of weights and cache alike.

    Raises:
        ValueError: for an unknown `model_type`, or lengths below 2.
    """
    config = getattr(model_or_config, "config", model_or_config)
    for name, value in (("prompt_length", prompt_length), ("new_tokens", new_tokens)):
        if value < 2:
            raise ValueError(f"{name}={value} leaves nothing to count: give at least 2 tokens")
    block = model_block(config)
    embedding = config.vocab_size * block.h
    head = 0 if config.tie_word_embeddings else embedding
    cache_row = 2 * block.K * block.d  # elements of one token's key and value in one layer
    mean_step = new_tokens / 2  # mean of i over 1 ... N-1

    if config.model_type == "rope_encdec":
        merged = config.cross_attention == "merged"
        entering = prompt_length - merged
        encoder_length = -(-entering // config.encoder_pooling)  # that leaves the encoder
        layers = config.decoder_num_hidden_layers
        borrowing = layers - -(-layers // config.cross_attention_sharing)  # layers that read what another one makes
        encoder_layers = config.encoder_num_hidden_layers
        below = encoder_layers if config.first_pooled_layer is None else config.first_pooled_layer
        lengths = [entering] * below + [encoder_length] * (encoder_layers - below)
        encoder_block = dataclasses.replace(block, m=config.intermediate_size)
        cross_step = 0 if merged else block.q + block.o
        cross_parameters = (
            0 if merged else block.q + block.kv + block.o + block.query_extras + block.key_extras + block.h
        )
        cross_idle = 0 if merged else block.kv + block.key_extras  # made once per prompt, not touched by a decode step
        keys = encoder_length + mean_step + 1
        first_keys = encoder_length + 1
        window = encoder_length
        if config.encoder_sliding_window is not None:
            window = config.encoder_sliding_window
            window = 2 * window - 1 if config.encoder_attention == "bidirectional" else window
        quadratic = sum(
            block.attention(length, min(window, length) if kind == "sliding_attention" else length)
            for length, kind in zip(lengths, config.attention_of_encoder_layer, strict=True)
        )
        prompt_flops = 2 * (sum(lengths) * encoder_block.matrices + (layers - borrowing) * encoder_length * block.kv)
        first_step = layers * (2 * (block.matrices + cross_step) + block.attention(1, first_keys))
        cache_length = encoder_length + new_tokens
        parameters = {
            "embedding": embedding,
            "encoder": encoder_layers * encoder_block.parameters + block.h,
            "decoder": layers * (block.parameters + cross_parameters) - borrowing * cross_idle + block.h,
            "head": head,
        }
    else:
        layers, cross_step, cross_idle, borrowing, encoder_length = config.num_hidden_layers, 0, 0, 0, 0
        keys = prompt_length + mean_step
        quadratic = layers * block.attention(prompt_length, prompt_length)
        prompt_flops = layers * 2 * prompt_length * block.matrices
        first_step = 0  # the prompt's last position predicts the first token: no step of its own
        cache_length = prompt_length + new_tokens - 1
        parameters = {
            "embedding": embedding,
            "encoder": 0,
            "decoder": layers * block.parameters + block.h,
            "head": head,
        }

    step_weights = parameters["decoder"] - (layers - borrowing) * cross_idle + embedding + block.h
    cache_read = cache_row * (layers * keys - borrowing * encoder_length) * dtype.itemsize
    return ModelCost(
        kind="encoder-decoder" if config.is_encoder_decoder else "decoder-only",
        parameters={**parameters, "total": sum(parameters.values())},
        first_token_flops=int(prompt_flops + quadratic + first_step + 2 * embedding),
        first_token_attention_flops=int(quadratic),
        flops_per_token=layers * (2 * (block.matrices + cross_step) + block.attention(1, keys)) + 2 * embedding,
        bytes_per_token=step_weights * dtype.itemsize + cache_read,
        weight_bytes_per_token=step_weights * dtype.itemsize,
        cache_bytes_per_token=cache_read,
        kv_cache_bytes=int(cache_row * (layers * cache_length - borrowing * encoder_length) * dtype.itemsize),
    )


def decoder_only_config(config):
    """A config of the decoder-only model that a student's layers came from: the same blocks, its depth.

    Args:
        config: a `rope_encdec` config.

    Returns:
        A Llama, Qwen2 or Qwen3 config, whichever has the student's biases and norms; None if the student was not made
        by `from_decoder_only`.
    """
    depth = config.teacher_num_hidden_layers
    if depth is None:
        return None
    family = "qwen3" if config.qk_norm else "qwen2" if config.attention_bias == "qkv" else "llama"
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    names += ("head_dim", "attention_bias", "mlp_bias", "tie_word_embeddings", "max_position_embeddings")
    fields = {name: getattr(config, name) for name in names}
    if family == "qwen2":
        del fields["attention_bias"]
    return AutoConfig.for_model(family, num_hidden_layers=depth, **fields)


@dataclasses.dataclass(frozen=True)
class CostComparison:
    """Cost of a student and of the decoder-only model it came from, for the same request, and student / teacher."""

    prompt_length: int
    new_tokens: int
    dtype: str
    student: ModelCost
    teacher: ModelCost

    @property
    def ratio(self) -> dict[str, float]:
        """Student over teacher: below 1 the student is cheaper."""
        names = ("first_token_flops", "flops_per_token", "bytes_per_token", "kv_cache_bytes")
        ratios = {name: getattr(self.student, name) / getattr(self.teacher, name) for name in names}
        return {"parameters": self.student.parameters["total"] / self.teacher.parameters["total"], **ratios}

    def to_dict(self) -> dict:
        """The `cost` entry of `metrics.json` (see `hf_encdec_distill.cards.model_card`)."""
        return {**dataclasses.asdict(self), "ratio": self.ratio}


def compare_cost(
    student, teacher, prompt_length: int, new_tokens: int = 32, dtype: torch.dtype = torch.bfloat16
) -> CostComparison:
    """`model_cost` of both for the same request; models or configs, `prompt_length` as the teacher counts it.

    Raises:
        ValueError: as `model_cost`.
    """
    costs = [model_cost(model, prompt_length, new_tokens, dtype) for model in (student, teacher)]
    return CostComparison(prompt_length, new_tokens, str(dtype).removeprefix("torch."), *costs)
