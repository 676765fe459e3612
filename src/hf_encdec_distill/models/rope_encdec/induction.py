"""The layers by which a model copies from what it has read.

A head of the previous token writes into each position which token came before it. Above it, an induction head attends
from a token to what followed the same token earlier (Olsson et al., arXiv 2209.11895). Answers that quote their prompt
depend on the two, and a student whose layers have neither has to learn them from its rows. Both show on random tokens
that are repeated once, where nothing but the first time says what comes next.
"""

import math

import torch
from torch import Tensor
from transformers.utils import logging


logger = logging.get_logger(__name__)

_SEQUENCES, _LENGTH = 4, 48  # random tokens, each sequence read twice in a row
_LEAST = 0.3  # of the attention, on average; what attends less is no such head


@torch.no_grad()
def copying_layers(teacher) -> tuple[int, int] | None:
    """The layer of the strongest induction head, and that of the strongest head of the previous token below it.

    Args:
        teacher ([`PreTrainedModel`]): A decoder-only model of a supported family.

    Returns:
        `(previous, induction)`, or None where there is no such pair.
    """
    tokens = torch.randint(
        teacher.config.vocab_size, (_SEQUENCES, _LENGTH), generator=torch.Generator().manual_seed(0)
    ).to(next(teacher.parameters()).device)
    attentions = _attentions(teacher, tokens.repeat(1, 2))
    # The strongest head of each layer. After a token for the second time, the one that followed it the first time.
    previous = [_strongest(layer.diagonal(-1, -2, -1)) for layer in attentions]
    induction = [_strongest(layer.diagonal(1 - _LENGTH, -2, -1)[..., 1:]) for layer in attentions]
    above = max(range(len(induction)), key=induction.__getitem__)
    below = max(range(above), key=previous.__getitem__, default=None)
    if below is None or min(induction[above], previous[below]) < _LEAST:
        return None
    return below, above


def copying_first(teacher, influence: dict[str, list[float]], alone: bool = False) -> dict[str, list[float]]:
    """The influence of layers (`measure_teacher`) with those in front by which the teacher copies.

    The induction head reads on the decoder's side, and what it looks for is written on the encoder's; the decoder-only
    student (`alone`) has both on one.
    """
    found = copying_layers(teacher)
    if found is None:
        logger.warning(
            f"{teacher.name_or_path or 'The teacher'} has no induction head that attends as much as one does: its "
            "layers are chosen by influence alone."
        )
        return influence
    influence = {side: list(values) for side, values in influence.items()}
    previous, induction = found
    influence["decoder" if alone else "encoder"][previous] = math.inf
    influence["decoder"][induction] = math.inf
    return influence


def _attentions(teacher, tokens: Tensor) -> tuple[Tensor, ...]:
    """Of each layer `(sequences, heads, 2 x length, 2 x length)`, which only the eager implementation gives."""
    before = teacher.config._attn_implementation
    teacher.set_attn_implementation("eager")
    try:
        return teacher.model(input_ids=tokens, output_attentions=True, use_cache=False).attentions
    finally:
        teacher.set_attn_implementation(before)


def _strongest(attention: Tensor) -> float:
    """`(sequences, heads, positions)`"""
    return attention.float().mean(dim=(0, 2)).max().item()
