"""How many tokens a model has positions for, and whether a batch keeps within that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...models.families import is_merged


if TYPE_CHECKING:
    from torch import Tensor


_MEND = "cut texts with max_source_length and max_target_length, or leave such rows out."


def max_positions(config) -> int | None:
    """Tokens that a model was made to read at once; None where its config sets no limit, as T5's.

    RoPE that is scaled by a `factor` reaches that much farther than `max_position_embeddings` may say: some families
    count it in there (Llama 3), others do not (Qwen2 with YaRN, dynamic NTK), so the larger of the two is taken.
    """
    if getattr(config, "max_position_embeddings", None) is None:
        config = config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return int(limit * max(1.0, float(rope.get("factor") or 1.0)))


def check_length(who: str, limit: int | None, what: str, *masks: Tensor) -> None:
    """Raises ValueError where a row of a batch has more tokens than `who` has positions for.

    Args:
        limit: `max_positions` of it.
        what: the masks hold, for the message.
        masks: of shape `[B, L]` with an L of their own, nonzero where a token is; what they hold is read in a row.
    """
    # Mostly the shapes, which a device need not be asked for, say it already.
    if limit is None or sum(mask.shape[1] for mask in masks) <= limit:
        return
    import torch

    lengths = torch.stack([mask.bool().sum(dim=1) for mask in masks]).sum(dim=0)
    row = int(lengths.argmax())
    if lengths[row] > limit:
        _refuse(f"row {row} of the batch", int(lengths[row]), what, f"the {who}", limit, _MEND)


def check_rows(who: str, config, sources: Sequence[int], targets: Sequence[int], mend: str = _MEND) -> None:
    """As `check_length`, before there are batches.

    Args:
        config: of a decoder-only model or an encoder-decoder, which reads both in a row if it is merged.
        sources, targets: tokens of each row; a target may be as long as what is to be written can become.
        mend: what the message advises.
    """
    limit = max_positions(config)
    both = {"source": sources, "target": targets}
    if _reads_in_a_row(config):
        both = {"prompt and target": [sum(pair) for pair in zip(sources, targets, strict=True)]}
    for what, lengths in both.items():
        row = max(range(len(lengths)), key=lengths.__getitem__)
        if limit is not None and lengths[row] > limit:
            _refuse(f"row {row}", lengths[row], what, who, limit, mend)


def room_for_target(config, source: int) -> int | None:
    """Target tokens for which a model has positions once it has read `source` tokens; None where there is no limit."""
    limit = max_positions(config)
    return limit - source if limit is not None and _reads_in_a_row(config) else limit


def _reads_in_a_row(config) -> bool:
    """Whether prompt and target share positions."""
    return not config.is_encoder_decoder or is_merged(config)


def _refuse(row: str, length: int, what: str, who: str, limit: int, mend: str) -> None:
    raise ValueError(
        f"{row} has {length} tokens of {what}, but {who} has positions for {limit} (max_position_embeddings): {mend}"
    )
