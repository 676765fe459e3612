"""Training that ends where its loss or its weights are no longer finite, and never saves such weights."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...models.finite import not_finite


# Batches in a row whose loss overflows before training with a gradient scaler ends. Their steps are skipped, so the
# weights stay, and a lower scale, which is the gradients', does not mend a forward pass.
_OVERFLOWS = 32
_MEND = (
    "lower learning_rate, clip gradients (max_grad_norm), or train in bf16 or float32 in place of fp16, from the last "
    "checkpoint"
)


if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class FiniteTraining(_Trainer):
    """Mix-in for a `Trainer`: it ends, with an error that says where it began, once loss or weights are not finite.

    `Trainer` leaves NaN out of its log (`logging_nan_inf_filter`), goes on, and saves over good checkpoints. Here the
    loss of each batch is checked before its backward; that waits for the device once, as the log's filter does
    anyway. Weights are checked where such a loss shows, before each save and at the end of training.

    Where a gradient scaler skips steps (fp16), a loss that overflows is left to it, unless many in a row do.

    Raises:
        ValueError: from `train`, `evaluate` and `save_model`.
    """

    model: nn.Module
    _overflows = 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.check_loss(result[0] if isinstance(result, tuple) else result)
        return result

    def check_loss(self, loss: Tensor, explain: Callable[[], str] = lambda: "") -> None:
        """Raises ValueError where the loss of a batch is not finite, and no gradient scaler will skip its step.

        Args:
            loss: one number, or one of each device.
            explain: what of it is not finite, in a few words; asked only where something is not.
        """
        if torch.isfinite(loss).all():
            self._overflows = 0
            return
        why = explain()
        self.check_weights()
        self._overflows += 1
        skips = self.accelerator.scaler is not None or self.accelerator.mixed_precision == "fp16"
        if not skips or self._overflows >= _OVERFLOWS:
            often = f" in each of the last {self._overflows} batches" if skips else ""
            raise ValueError(
                f"the loss is {loss.detach().float().sum().item()}{often} after {self.state.global_step} optimizer "
                f"steps, while all weights are finite{why and f': {why}'}. No step was made with it; {_MEND}."
            )

    def named_weights(self) -> Iterable[tuple[str, Tensor]]:
        """What a checkpoint holds."""
        return self.model.named_parameters()

    def check_weights(self) -> None:
        """Raises ValueError, naming the weight, where one is not finite."""
        name = not_finite(self.named_weights())
        if name is None:
            return
        steps = self.state.global_step
        if not steps:
            raise ValueError(
                f"the weight {name!r} is not finite before the first step, it holds NaN or infinity: train a model "
                "whose weights are finite."
            )
        raise ValueError(
            f"the weight {name!r} is not finite after {steps} optimizer steps, and nothing is saved of it: {_MEND}."
        )

    def save_model(self, *args, **kwargs):
        self.check_weights()  # before a folder is made, or the one of the last save written over
        super().save_model(*args, **kwargs)

    def train(self, *args, **kwargs):
        self._overflows = 0
        output = super().train(*args, **kwargs)
        self.check_weights()
        return output


def explain_loss(terms: Mapping[str, Tensor], rows: Tensor, step: int) -> str:
    """Which terms of a distillation loss are not finite, and where.

    Args:
        terms: `[N]` each, `ce_loss` of the student alone and the others of both.
        rows: `[N]`, the row of the batch that each belongs to.
        step: the optimizer step, for the message.

    Raises:
        ValueError: the teacher's logits made it NaN, and not the student's.
    """
    wrong = {name: ~torch.isfinite(values) for name, values in terms.items()}
    if "distill_loss" in terms:
        by_teacher = torch.isnan(terms["distill_loss"]) & ~wrong["ce_loss"]
        if by_teacher.any():
            raise ValueError(
                f"the teacher's logits are not finite at {int(by_teacher.sum())} of the {len(rows)} target tokens of "
                f"a batch in step {step}, in its rows {_listed(rows[by_teacher])}: run the teacher in another dtype "
                "(teacher_dtype), or leave those rows out. The student is as it was before that step."
            )
    parts = [
        f"{name} is not finite at {int(where.sum())} of its {len(rows)} target tokens, in the rows "
        f"{_listed(rows[where])} of the batch"
        for name, where in wrong.items()
        if where.any()
    ]
    return "; ".join(parts) or "its terms are finite, their sum is not"


def _listed(rows: Tensor) -> str:
    numbers = sorted(set(rows.tolist()))
    return f"{numbers[:8]}{'...' if numbers[8:] else ''}"
