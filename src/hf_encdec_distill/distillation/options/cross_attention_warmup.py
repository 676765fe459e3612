"""Cross-attention first: for some steps nothing else of the student is trained.

A cross-attention that is new, or copied from elsewhere, at first hands noise to layers that know their work; until it
has learnt to read, their gradients unlearn it (T5Gemma warms its own up for 1,000 steps, arXiv 2504.06225, section 3).

The gradients of all others are computed and then dropped, so every parameter keeps its place in the optimizer and in
DistributedDataParallel. An optimizer skips a parameter without gradient, weight decay and moments included.
"""

import re

from torch import nn

from ...models.families import is_merged


# What transformers' encoder-decoders call it: `cross_attn` (ours, T5Gemma, ProphetNet), `encoder_attn` (BART and its
# kin, Whisper), `crossattention` (BERT, GPT-2), `T5LayerCrossAttention` with the norm before it (T5 and its kin).
_MODULE_NAME = re.compile(r"cross_?att|encoder_attn")
_CLASS_NAME = re.compile(r"CrossAttention$")


def cross_attention_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of the cross-attentions and of the norms that belong to them."""
    return {
        parameter
        for name, module in model.named_modules()
        if _MODULE_NAME.search(name.rpartition(".")[-1]) or _CLASS_NAME.search(type(module).__name__)
        for parameter in module.parameters()
    }


def check_cross_attention_warmup(model: nn.Module, steps: int, gradients_are_whole: bool) -> None:
    """Raises ValueError where `cross_attention_warmup_steps` of `steps` cannot work.

    Args:
        model: the student, unwrapped.
        steps: the argument, for the message.
        gradients_are_whole: whether each parameter has its gradient for itself, in `.grad`.
    """
    asked = f"cross_attention_warmup_steps={steps}"
    if is_merged(model.config):
        raise ValueError(
            f"{asked} with cross_attention='merged', which has no cross-attention parameters: the decoder reads the "
            "prompt with its self-attention, and did so as the teacher. Leave it at 0 (freeze_encoder=True trains the "
            "decoder alone), or make the student with cross_attention='separate'."
        )
    if not any(parameter.requires_grad for parameter in cross_attention_parameters(model)):
        raise ValueError(
            f"{asked}, but {type(model).__name__} has no cross-attention that is trained: no module named cross_attn, "
            "crossattention or encoder_attn and none of a class that ends in CrossAttention. Leave it at 0."
        )
    if not gradients_are_whole:
        raise ValueError(
            f"{asked} drops the gradients of single parameters, which FSDP and DeepSpeed keep in pieces of many and "
            "layerwise optimizers and LOMO use up in the backward pass: use DistributedDataParallel and another "
            "optimizer, or leave it at 0."
        )


def keep_cross_attention_gradients(model: nn.Module) -> None:
    """Drops the gradients of all other parameters; called between backward and clipping."""
    kept = cross_attention_parameters(model)
    for parameter in model.parameters():
        if parameter not in kept:
            parameter.grad = None
