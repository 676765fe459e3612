"""Differences between transformers versions that the trainer has to know, each with the condition to remove it."""

from transformers import TrainingArguments


def refuse_legacy_prediction_loop(args: TrainingArguments) -> None:
    """transformers 4.57 can evaluate in `Trainer.prediction_loop`, which 5.0 removed; drop this with 4.57.

    That loop would report a mean of batch means beside our token-weighted numbers.
    """
    if getattr(args, "use_legacy_prediction_loop", False):
        raise ValueError(
            "use_legacy_prediction_loop=True averages over batches, not tokens; DistillationTrainer needs it False."
        )
