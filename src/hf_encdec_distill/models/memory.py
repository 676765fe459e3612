"""Bytes that a student's training step, and a teacher's forward pass, hold on one device: counted from configs.

Symbols as in `cost`: h, m, H, K, d of a block, V the vocabulary; e is 2 bytes under bf16 autocast, else 4. The
residual stream and the norms are float32 in either case. What a block keeps of a token for its backward pass:

    block             16*h                          two norms: the input, and that scaled
                      e = 2: 10*h (8*h without gate)  a cast for each of the products that read them
                      e = 4: 8*h                    their outputs, which products share
                      4*e*H*d                       queries, keys and values (repeated for their groups), the output
                      4*e*m (gated) or 2*e*m        inputs of the MLP's products
                      e*t                           the mask's row over the t keys
                      (4 + e)*(H + K)*d             norms over heads of queries and keys, where there are such norms
    `merged`          8*h + 2*e*H*d + e*N a prompt token and decoder layer: the state, normed; its keys and values
    `separate`        2*e*h (0 for e = 4) + 2*e*H*d + e*N a prompt token and decoder layer; in place of the block's
                      4*e*H*d a target token has 4*e*H*d + 2*e*K*d, and 10*h (e = 4: 12*h) for another norm
    handed over       4*h a prompt token, for each distinct encoder state that a `merged` decoder reads
    shared            a decoder layer that reads another one's keys and values of the prompt does without the 8*h or
                      2*e*h, and without the norms over heads of these keys

These are what autograd saves with transformers' `sdpa` attention, as `torch.autograd.graph.saved_tensors_hooks` counts
it (tests/model/test_memory.py). The pattern is that of arXiv 2205.05198, section 4.1, without what flash attention and
the absence of dropout save.
"""

from __future__ import annotations

import dataclasses
import math

from .cost import model_block, model_cost


# Bytes of all that stands beside a logit while a loss is made, its gradient among them. That of a live teacher is
# fitted to studies/chunked_loss.py (docs/studies/plan/plan.md); of a record it is a count of tensors.
LOGIT_BYTES = {"live": 29, "recorded": 24}
ADAMW_BYTES = 8  # two float32 moments a parameter
# Bytes of a weight in the teacher's blocks; NF4 has a float32 scale for 64 weights (arXiv 2305.14314, section 3).
WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "8bit": 1.0, "4bit": 0.5 + 4 / 64}


@dataclasses.dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device at the peak of a step of AdamW with float32 weights.

    Attributes:
        weights, gradients, optimizer: of all parameters, or of this device's shard.
        copies: bfloat16 copies of matrices that autocast keeps, or, sharded, what is gathered at once.
        activations: what the backward pass needs of all blocks, or with checkpoints of one.
        logits: of student and teacher at the targets whose loss is made at once, with their gradients.
    """

    weights: int
    gradients: int
    optimizer: int
    copies: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def to_dict(self) -> dict[str, int]:
        return {**dataclasses.asdict(self), "total": self.total}


def training_memory(
    config,
    rows: int,
    prompt_length: int,
    target_length: int,
    *,
    teacher: str = "recorded",
    autocast: bool = True,
    checkpointing: bool = False,
    chunk_size: int | None = 128,
    shards: int = 1,
) -> TrainingMemory:
    """Of a step of `DistillationTrainer`.

    Args:
        config: of a `rope_encdec` student or of a Llama-like decoder-only one.
        rows: of a batch on this device.
        prompt_length, target_length: tokens of a row, padding included.
        teacher: `live` or `recorded`.
        autocast: bfloat16 products, as with `bf16=True`; False for float32.
        checkpointing: `gradient_checkpointing`.
        chunk_size: `loss_chunk_size`; None where all logits are made at once.
        shards: devices that FSDP2 spreads weights, gradients and optimizer over; 1 for none.

    Raises:
        ValueError: as `model_cost`.
    """
    parameters = model_cost(config, prompt_length, target_length).parameters
    total, head = parameters["total"], parameters["embedding"]
    targets = rows * target_length
    at_once = targets if chunk_size is None or targets <= 4 * chunk_size else chunk_size
    logits = LOGIT_BYTES[teacher] * at_once * config.vocab_size
    if at_once < targets:  # the head once more in bfloat16, and the gradient that a chunk has of it
        logits += 5 * head
    layers = _layers(config)
    blocks = total - parameters["embedding"] - parameters["head"]
    if shards > 1:  # weights and gradients of embedding and head, of the block in use and of the next one
        copies = 2 * 2 * (parameters["embedding"] + parameters["head"] + 2 * math.ceil(blocks / layers))
    else:
        copies = 2 * (blocks + head) if autocast else 0
    return TrainingMemory(
        weights=math.ceil(4 * total / shards),
        gradients=math.ceil(4 * total / shards),
        optimizer=math.ceil(ADAMW_BYTES * total / shards),
        copies=copies,
        activations=rows * row_activations(config, prompt_length, target_length, autocast, checkpointing),
        logits=logits,
    )


def _layers(config) -> int:
    if config.model_type == "rope_encdec":
        return config.encoder_num_hidden_layers + config.decoder_num_hidden_layers
    return config.num_hidden_layers


def row_activations(config, prompt_length: int, target_length: int, autocast: bool, checkpointing: bool) -> int:
    """Bytes that the blocks keep of one row for its backward pass; the formulas are in the module's docstring."""
    block, e, layers = model_block(config), 2 if autocast else 4, _layers(config)
    h = block.h
    of_norms = (4 + e) * block.d if block.qk_norm else 0  # a head
    casts = 2 * h * (5 if block.gated else 4) if autocast else 8 * h
    fixed = 16 * h + casts + 4 * e * block.H * block.d + of_norms * (block.H + block.K)

    def of_block(width: int, tokens: int, keys: int) -> int:
        return tokens * (fixed + (4 if block.gated else 2) * e * width + e * keys)

    if config.model_type != "rope_encdec":
        tokens = prompt_length + target_length
        whole = of_block(block.m, tokens, tokens)
        return layers * 4 * h * tokens + whole if checkpointing else layers * whole
    merged = config.cross_attention == "merged"
    entering = prompt_length - merged
    leaving = -(-entering // config.encoder_pooling)
    below = config.first_pooled_layer
    encoder_layers, decoder_layers = config.encoder_num_hidden_layers, config.decoder_num_hidden_layers
    below = encoder_layers if below is None else below
    encoder = [of_block(config.intermediate_size, entering, entering)] * below
    encoder += [of_block(config.intermediate_size, leaving, leaving)] * (encoder_layers - below)
    prompt = 2 * e * block.H * block.d + e * target_length
    decoder = of_block(config.decoder_intermediate_size, target_length, target_length)
    projected = of_norms * block.K
    if merged:
        projected += 8 * h
    else:
        projected += 2 * e * h if autocast else 0
        decoder += target_length * ((10 if autocast else 12) * h + 2 * e * block.K * block.d + of_norms * block.H)
    decoder += leaving * prompt
    projected *= leaving
    handed_over = 4 * h * leaving * len(config.encoder_states_read) if merged else 0
    if checkpointing:
        inputs = 4 * h * (below * entering + (encoder_layers - below) * leaving + decoder_layers * target_length)
        return inputs + handed_over + max(*encoder, decoder + projected)
    groups = -(-decoder_layers // config.cross_attention_sharing)
    return sum(encoder) + decoder_layers * decoder + groups * projected + handed_over


def weight_bytes(config, dtype: str) -> int:
    """Bytes of a decoder-only model's weights in a dtype of `WEIGHT_BYTES`. Embedding and head stay in bfloat16 where
    bitsandbytes quantizes the blocks."""
    parameters = model_cost(config, 2, 2).parameters
    ends = parameters["embedding"] + parameters["head"]
    blocks = parameters["total"] - ends
    return math.ceil(blocks * WEIGHT_BYTES[dtype] + ends * max(WEIGHT_BYTES[dtype], 2))


def forward_bytes(config, rows: int, prompt_length: int, target_length: int) -> int:
    """Bytes that a forward pass of a teacher in half precision needs beside its weights: the states of one block, and
    the logits at the targets."""
    block = model_block(config)
    tokens = rows * (prompt_length + target_length)
    return 2 * tokens * (4 * block.h + 3 * block.m) + 2 * rows * target_length * config.vocab_size
