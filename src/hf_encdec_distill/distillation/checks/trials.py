"""Hyperparameter search: which fields of a distillation a trial may set, and what it is judged by.

`Trainer.hyperparameter_search` writes a trial's values into the arguments of a trainer that was set up with others.
"""

from __future__ import annotations

from typing import Any

from transformers.trainer_utils import default_compute_objective

from ..arguments import OWN_FIELDS, DistillationTrainingArguments


# Those that are read at each step, or whose effect the trainer sets up again for each trial.
_OF_A_TRIAL = {
    *("divergence", "jsd_beta", "skew_alpha", "distill_weight", "distill_temperature", "hidden_state_weight"),
    *("on_policy_fraction", "on_policy_warmup_steps", "sampling_temperature", "replay_fraction"),
    *("loss_chunk_size", "max_tokens_per_batch"),
}
# What an evaluation reports beside the loss and the measures of `compute_metrics`: parts of that loss, and a time.
_NO_OBJECTIVE = (
    *("_ce_loss", "_distill_loss", "_hidden_state_loss", "_teacher_agreement", "_teacher_asked"),
    "_model_preparation_time",
)


def default_objective(metrics: dict[str, float]) -> float:
    """As `Trainer`'s: the sum of what `compute_metrics` gives, and the loss if it gives nothing."""
    return default_compute_objective({k: v for k, v in metrics.items() if not k.endswith(_NO_OBJECTIVE)})


def own_fields(args: DistillationTrainingArguments) -> dict[str, Any]:
    """The fields that distillation adds. By their names: plain arguments that were given them do not declare them."""
    return {name: getattr(args, name) for name in OWN_FIELDS}


def check_trial(before: dict[str, Any], args: DistillationTrainingArguments) -> None:
    """
    Args:
        before: `own_fields` before the trial set its own.

    Raises:
        ValueError: it has set one that would have no effect.
    """
    changed = {name for name, value in own_fields(args).items() if value != before[name]}
    lost = sorted(changed - _OF_A_TRIAL)
    # The projections are made, or not, before the search begins.
    if "hidden_state_weight" in changed and 0 in (before["hidden_state_weight"], args.hidden_state_weight):
        lost.append("hidden_state_weight")
    if lost:
        raise ValueError(
            f"a trial sets {lost[0]}={getattr(args, lost[0])!r}, for which the trainer is set up once, with "
            f"{before[lost[0]]!r}: leave it out of the search, or make a trainer for each value"
        )
