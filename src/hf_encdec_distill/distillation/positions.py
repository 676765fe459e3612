"""How many tokens a model has positions for, and whether a batch keeps within that."""

from torch import Tensor


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
    lengths = sum(mask.bool().sum(dim=1) for mask in masks)
    row = int(lengths.argmax())
    if lengths[row] > limit:
        raise ValueError(
            f"row {row} of the batch has {int(lengths[row])} tokens of {what}, but the {who} has positions for "
            f"{limit} (max_position_embeddings): cut texts with max_source_length and max_target_length, or leave "
            "such rows out."
        )
