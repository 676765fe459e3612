"""Quantization-aware training: the student computes with the weights that a 4-bit export will give it.

While it trains, evaluates or generates, each weight that an export quantizes is rounded to the export's grid, and its
gradient goes straight through to the float weight (Bengio et al. 2013, arXiv 1308.3432, section 2.3; Jacob et al.
2018, arXiv 1712.05877, section 3). The optimizer moves the float weights, and they are saved, under their own names.

`torch.nn.utils.parametrize` would rename them in every checkpoint, change the class of each layer and round once for
each use. Instead, the rounded tensors take the parameters' place for the length of a step, including the backward
pass, in which gradient checkpointing runs layers again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..losses import at_least_float32


_BLOCK = 32  # weights of a row that share a scale


def _asymmetric(blocks_NB: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point `[N, 1]`, for 0 to 15: from the least to the greatest weight, 0 among them."""
    low, high = blocks_NB.amin(1, keepdim=True).clamp(max=0), blocks_NB.amax(1, keepdim=True).clamp(min=0)
    scale = _not_zero((high - low) / 15)
    return scale, (-low / scale).round()


def _symmetric(blocks_NB: Tensor) -> tuple[Tensor, Tensor]:
    """The same where the zero point is in the middle: the weight of the greatest magnitude is eight steps from it."""
    largest = blocks_NB.gather(1, blocks_NB.abs().argmax(1, keepdim=True))
    return _not_zero(largest.abs() / 8), torch.where(largest > 0, 7.0, 8.0)


def _not_zero(scale: Tensor) -> Tensor:
    return scale.masked_fill(scale == 0, 1.0)  # any will do for a block of zeros


# Blocks `[N, B]` -> scale and zero point, for each value of `qat`. "int4" is what our exports to ONNX and OpenVINO
# (dynamic shapes) store: onnxruntime/quantization/matmul_nbits_quantizer.py, v1.32, quant_slice_asymmetric, and
# nncf/quantization/algorithms/weight_compression/weight_lowering.py, v3.4. "q4_0" is quantize_row_q4_0_ref of
# llama.cpp, ggml/src/ggml-quants.c.
QAT: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"int4": _asymmetric, "q4_0": _symmetric}


def fake_quantize(weight: Tensor, qat: str) -> Tensor:
    """`weight` `[out, in]` as it is after rounding to 4 bits in blocks of 32 along `in`; no gradient."""
    with torch.no_grad():
        columns = weight.shape[1]
        padded = F.pad(weight.to(at_least_float32(weight.dtype)), (0, -columns % _BLOCK))
        blocks = padded.reshape(-1, _BLOCK)
        scale, zero = QAT[qat](blocks)
        rounded = (blocks / scale).add_(zero).round_().clamp_(0, 15).sub_(zero).mul_(scale)
        return rounded.reshape(padded.shape)[:, :columns].to(weight.dtype)


def _straight_through(weight: Tensor, qat: str) -> Tensor:
    return weight + (fake_quantize(weight, qat) - weight).detach()


@contextmanager
def fake_quantized(model: PreTrainedModel, qat: str | None) -> Iterator[None]:
    """While the block runs, linear layers and token embeddings of `model` have weights rounded as `qat` says.

    The parameters get the gradients of what is computed meanwhile; those that are tied stay so.

    Args:
        qat: a key of `QAT`; None: nothing is rounded.
    """
    if qat is None:
        yield
        return
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    weights = [embedding.weight] + [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    rounded: dict[Tensor, Tensor] = {weight: _straight_through(weight, qat) for weight in weights}
    named = [(module, module._parameters.get("weight")) for module in model.modules()]
    places = [(module, weight) for module, weight in named if weight is not None and weight in rounded]
    for module, weight in places:
        module._parameters["weight"] = rounded[weight]  # type: ignore[assignment]  # as torch.func.functional_call does
    try:
        yield
    finally:
        for module, weight in places:
            module._parameters["weight"] = weight
