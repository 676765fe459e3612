"""A student whose decoder alone is trained: for good, or until `unfreeze_encoder_after`.

The optimizer has the encoder's parameters from the beginning, in the groups that `Trainer` makes. Without a gradient
it skips them, moments and weight decay included. So its groups, the learning-rate schedule and the checkpoints are the
same before the encoder is unfrozen and after.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import logging

from .schedules import wrap_again


logger = logging.get_logger(__name__)


def freeze_encoder(model: PreTrainedModel) -> list[nn.Parameter]:
    """Takes the gradient from all that the encoder reads, so that what it says of a prompt stays what it was.

    An embedding that the decoder shares is among it, and with it an LM head that is tied to that; an untied one is
    trained. Dropout in the encoder is left as it is.

    Returns:
        The parameters that had a gradient.

    Raises:
        ValueError: nothing of the model is left to train.
    """
    frozen = [parameter for parameter in model.get_encoder().parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"freeze_encoder=True leaves nothing to train of {type(model).__name__}: its decoder is frozen, or "
            "is its encoder."
        )
    return frozen


@contextmanager
def unfrozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Parameters that ask for a gradient while the block runs."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, was_trained in zip(parameters, before, strict=True):
            parameter.requires_grad_(was_trained)


class UnfreezeEncoder(TrainerCallback):
    """The encoder is trained too once `unfreeze_encoder_after` steps are made, or that share of all steps.

    Raises:
        ValueError: what this cannot work with; the message says what to change.
    """

    def __init__(self, trainer) -> None:
        self._trainer = trainer
        self._what = f"unfreeze_encoder_after={trainer.args.unfreeze_encoder_after}"
        if trainer.is_sharded or trainer.get_tp_size() > 1:
            raise ValueError(
                f"{self._what} with FSDP, DeepSpeed or tensor parallelism, which divide the parameters before "
                "training begins: use DistributedDataParallel, or leave it out."
            )

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        """Raises ValueError where training would end before, or the optimizer could not train the encoder."""
        self._step = step_of(args.unfreeze_encoder_after, state.max_steps)
        if state.max_steps <= self._step:
            raise ValueError(
                f"{self._what}, but training ends at step {state.max_steps}: give fewer steps, or leave it out to "
                "keep the encoder frozen."
            )
        if not self._trainer.frozen_parameters:
            raise ValueError(
                f"{self._what}, but the student's encoder was frozen before the trainer was made, so that it is not "
                "known what is to be trained of it: load the student again."
            )
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if any(id(parameter) not in held for parameter in self._trainer.frozen_parameters):
            raise ValueError(
                f"{self._what}, but the optimizer does not hold the encoder's parameters: make an optimizer of your "
                "own of all parameters before the trainer, or choose an optim that does not step in the backward pass."
            )
        self._set(state.global_step >= self._step)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self._step:
            logger.info(f"the encoder is trained too from step {self._step} on.")
            self._set(True)

    def _set(self, trained: bool) -> None:
        trainer = self._trainer
        if all(parameter.requires_grad == trained for parameter in trainer.frozen_parameters):
            return
        for parameter in trainer.frozen_parameters:
            parameter.requires_grad_(trained)
        trainer.forget_encoder()
        # It averages the gradients of those parameters that asked for one when it was made.
        if isinstance(trainer.model_wrapped, DistributedDataParallel):
            wrap_again(trainer.model_wrapped, trainer.accelerator.ddp_handler)


def step_of(after: float, max_steps: int) -> int:
    """Steps, from 1 on, or a share of `max_steps`, below 1: as `warmup_steps` of transformers 5."""
    return int(after) if after >= 1 else math.ceil(after * max_steps)
