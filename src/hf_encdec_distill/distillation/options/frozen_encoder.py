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

from ...models.families import is_merged
from ...models.rope_encdec.prompt_keys import key_value_modules, shared_prompt_keys
from .schedules import wrap_again


logger = logging.get_logger(__name__)


def freeze_encoder(model: PreTrainedModel, but: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Takes the gradient from all that the encoder reads, so that what it says of a prompt stays what it was.

    An embedding that the decoder shares is among it, and with it an LM head that is tied to that; an untied one is
    trained. Dropout in the encoder is left as it is.

    Args:
        but: parameters of the encoder that are trained all the same.

    Returns:
        The parameters that had a gradient.

    Raises:
        ValueError: nothing of the model is left to train.
    """
    frozen = freeze(model.get_encoder(), but)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"freeze_encoder=True leaves nothing to train of {type(model).__name__}: its decoder is frozen, or "
            "is its encoder."
        )
    return frozen


def freeze_prompt_keys(model: PreTrainedModel) -> None:
    """Takes the gradient from what makes the prompt's keys and values where an encoder layer and a decoder layer have
    it in common, so that they still have it in common after training.

    Raises:
        ValueError: no layers of the model have it in common, or it has an adapter, which would tell them apart.
    """
    if getattr(model, "peft_config", None):
        raise ValueError("freeze_prompt_keys=True with an adapter, which is another one in each layer: leave it out.")
    pairs = list(shared_prompt_keys(model)) if is_merged(model.config) else []
    if not pairs:
        raise ValueError(
            f"freeze_prompt_keys=True, but no decoder layer of this {type(model).__name__} makes the prompt's keys "
            "and values as the encoder layer beside it does. Those of a merged student do until they are trained, "
            "where both have the same layer of the teacher: give encoder_layers and decoder_layers to "
            "from_decoder_only, or leave it out."
        )
    for pair in pairs:
        for layer in pair:
            for module in key_value_modules(layer):
                freeze(module, but=())


def tell_of_frozen_encoder(model: PreTrainedModel) -> None:
    """Warns where a run is not asked to freeze the encoder and it is frozen all the same: by a run before, maybe."""
    if not getattr(model.config, "is_encoder_decoder", False) or getattr(model, "peft_config", None):
        return
    of_encoder = [parameter.requires_grad for parameter in model.get_encoder().parameters()]
    if not any(of_encoder) and any(parameter.requires_grad for parameter in model.parameters()):
        logger.warning(
            "No parameter of the encoder asks for a gradient, so that the decoder alone is trained: an earlier run "
            "with freeze_encoder=True leaves it so. model.requires_grad_(True) trains all again; freeze_encoder=True "
            "says that it is meant."
        )


def freeze(module: nn.Module, but: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Takes the gradient from all parameters but these, and returns those that had one."""
    kept = {id(parameter) for parameter in but}
    frozen = [parameter for parameter in module.parameters() if parameter.requires_grad and id(parameter) not in kept]
    for parameter in frozen:
        parameter.requires_grad_(False)
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


class Unfreeze(TrainerCallback):
    """Parameters that wait are trained too once so many steps are made, or that share of all steps.

    Args:
        trainer: its `waiting_parameters` has them, under the name of the option.
        option: the argument that says when.
        what: they are, in words.

    Raises:
        ValueError: what this cannot work with; the message says what to change.
    """

    def __init__(self, trainer, option: str, what: str) -> None:
        self._trainer, self._option, self._what = trainer, option, what
        self._said = f"{option}={getattr(trainer.args, option)}"
        if trainer.is_sharded or trainer.get_tp_size() > 1:
            raise ValueError(
                f"{self._said} with FSDP, DeepSpeed or tensor parallelism, which divide the parameters before "
                "training begins: use DistributedDataParallel, or leave it out."
            )

    @property
    def _parameters(self) -> Sequence[nn.Parameter]:
        return self._trainer.waiting_parameters[self._option]

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        """Raises ValueError where training would end before, or the optimizer could not train what waits."""
        self._step = step_of(getattr(args, self._option), state.max_steps)
        if state.max_steps <= self._step:
            raise ValueError(
                f"{self._said}, but training ends at step {state.max_steps}: give fewer steps, or leave it out to "
                f"keep {self._what} frozen."
            )
        if not self._parameters:
            raise ValueError(
                f"{self._said}, but {self._what} was frozen before the trainer was made, so that it is not known what "
                "is to be trained of it: load the student again."
            )
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if any(id(parameter) not in held for parameter in self._parameters):
            raise ValueError(
                f"{self._said}, but the optimizer does not hold the parameters of {self._what}: make an optimizer of "
                "your own of all parameters before the trainer, or choose an optim that does not step in the backward "
                "pass."
            )
        self._set(state.global_step >= self._step)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self._step:
            logger.info(f"{self._what} is trained too from step {self._step} on.")
            self._set(True)

    def _set(self, trained: bool) -> None:
        trainer = self._trainer
        if all(parameter.requires_grad == trained for parameter in self._parameters):
            return
        for parameter in self._parameters:
            parameter.requires_grad_(trained)
        trainer.forget_encoder()
        # It averages the gradients of those parameters that asked for one when it was made.
        if isinstance(trainer.model_wrapped, DistributedDataParallel):
            wrap_again(trainer.model_wrapped, trainer.accelerator.ddp_handler)


def step_of(after: float, max_steps: int) -> int:
    """Steps, from 1 on, or a share of `max_steps`, below 1: as `warmup_steps` of transformers 5."""
    return int(after) if after >= 1 else math.ceil(after * max_steps)
