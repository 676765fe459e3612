"""Students whose architecture changes while they learn: a layer less every so many steps, and an encoder that learns
to look ahead.

Both depend on the step, the seed and the checkpoint alone, so that a run that was stopped goes on as it would have.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.utils import logging

from ...models.rope_encdec.depth import SIDES, config_without_layer, remove_layer, without_layer


logger = logging.get_logger(__name__)


class ProgressiveDepth(TrainerCallback):
    """One layer less every `progressive_depth_steps` steps, until `final_encoder_layers` and `final_decoder_layers`.

    Before a step whose number is a multiple of it, the layer goes whose absence raises the distillation loss least on
    that step's batches, which the student has yet to learn from. The optimizer keeps its state of all other
    parameters, and the learning rate its course. Layers are judged by the loss without them as in Shortened LLaMA
    (arXiv 2402.02834, the perplexity criterion), which takes all out at once and trains afterwards.

    Where a `merged` decoder layer alone reads the deepest state that is read, it stays if an encoder of the final
    depth would end in layers that nobody reads.

    Each removal is logged: `encoder_layers` and `decoder_layers` that are left, `removed_encoder_layer` or
    `removed_decoder_layer` with its number in the student that training began with, and `loss_after_removal`. From
    these records a resumed run knows which layers its checkpoint lacks.

    Raises:
        ValueError: what this cannot work with; the message says what to change.
    """

    def __init__(self, trainer) -> None:
        self._trainer = trainer
        self._removed: list[tuple[str, int]] = []
        self._last_step = 0
        args, student = trainer.args, trainer.model
        what = f"progressive_depth_steps={args.progressive_depth_steps}"
        _check_student(student, what)
        _check_whole(trainer, what)
        for side in SIDES:
            final = self._final(side)
            if final is not None and final > self._count(side):
                raise ValueError(
                    f"final_{side}_layers={final}, but the student's {side} has {self._count(side)} layers; give a "
                    "deeper student or a smaller number."
                )
            if self._surplus(side) > 0:
                config_without_layer(student.config, side, 0)  # refuses now what would end the run later

    def on_train_begin(self, args, state, control, **kwargs):
        """Raises ValueError where training would end before the student has its final depth."""
        self._removed, self._last_step = _removals(state), 0
        every = args.progressive_depth_steps
        first = max(1, math.ceil(state.global_step / every))
        chances = (state.max_steps - 1) // every - first + 1
        if self._left() > chances:
            raise ValueError(
                f"progressive_depth_steps={every} with {self._left()} layers to take out needs more than "
                f"{every * (first - 1 + self._left())} steps, and training ends at step {state.max_steps}. Train for "
                "longer, take out layers more often, or fewer of them."
            )

    def is_due(self) -> bool:
        """Whether a layer goes before the step that comes next."""
        step = self._trainer.state.global_step
        return bool(
            step != self._last_step and step % self._trainer.args.progressive_depth_steps == 0 and self._left()
        )

    def candidates(self) -> list[tuple[str, int]]:
        """Layers that may go, as a side and an index."""
        config = self._trainer.model.config
        read, final = config.encoder_states_read[-1], self._final("encoder")
        least = read if final is None else min(read, final)
        return [
            (side, index)
            for side in SIDES
            if self._surplus(side) > 0
            for index in range(self._count(side))
            if config_without_layer(config, side, index).encoder_states_read[-1] >= least
        ]

    def without_each(self) -> list[Callable[[], AbstractContextManager]]:
        """For each of `candidates` a context in which the student computes without it."""
        return [partial(without_layer, self._trainer.model, side, index) for side, index in self.candidates()]

    def remove_best(self, losses: Tensor) -> None:
        """Takes out the one of `candidates` with the least of `losses`, the first of equals."""
        side, index = self.candidates()[int(losses.argmin())]
        layer = self._kept(side)[index]
        self._remove(side, layer)
        self._last_step = self._trainer.state.global_step
        counts = {f"{name}_layers": self._count(name) for name in SIDES}
        self._trainer.log({**counts, f"removed_{side}_layer": layer, "loss_after_removal": losses.min().item()})

    def shrink_to(self, checkpoint: str) -> None:
        """Takes out what a checkpoint lacks, unless the student lacks it already.

        Raises:
            ValueError: the student is neither the one that training began with nor as deep as the checkpoint.
        """
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        removed = _removals(state)
        if not removed:
            return
        last = next(log for log in reversed(state.log_history) if "encoder_layers" in log)
        saved = [last[f"{side}_layers"] for side in SIDES]
        begun = [last[f"{side}_layers"] + sum(side == name for name, _ in removed) for side in SIDES]
        given = [self._count(side) for side in SIDES]
        if given == begun:
            self._removed = []
            for side, layer in removed:
                self._remove(side, layer)
        elif given != saved:
            raise ValueError(
                f"{checkpoint} has {saved[0]} + {saved[1]} layers of a student that began with {begun[0]} + "
                f"{begun[1]}, and the student given has {given[0]} + {given[1]}. Give the one that training began "
                "with, or the one in the checkpoint."
            )

    def _remove(self, side: str, layer: int) -> None:
        trainer = self._trainer
        trainable = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        remove_layer(trainer.model, side, self._kept(side).index(layer))
        self._removed.append((side, layer))
        kept = {id(parameter) for parameter in trainer.model.parameters() if parameter.requires_grad}
        if trainer.optimizer is not None:
            _forget(trainer.optimizer, [parameter for parameter in trainable if id(parameter) not in kept])
        if isinstance(trainer.model_wrapped, DistributedDataParallel):
            wrap_again(trainer.model_wrapped, trainer.accelerator.ddp_handler)

    def _count(self, side: str) -> int:
        return getattr(self._trainer.model.config, f"{side}_num_hidden_layers")

    def _final(self, side: str) -> int | None:
        return getattr(self._trainer.args, f"final_{side}_layers")

    def _surplus(self, side: str) -> int:
        final = self._final(side)
        return 0 if final is None else max(0, self._count(side) - final)

    def _left(self) -> int:
        return sum(self._surplus(side) for side in SIDES)

    def _kept(self, side: str) -> list[int]:
        """The layers that are there, by their numbers at the beginning."""
        removed = [layer for name, layer in self._removed if name == side]
        return [layer for layer in range(self._count(side) + len(removed)) if layer not in removed]


class EncoderAnnealing(TrainerCallback):
    """A causal encoder becomes bidirectional in `bidirectional_warmup_steps` steps.

    After `s` steps attention to later positions has the weight `a = s / bidirectional_warmup_steps`: `log(a)` is added
    to the scores of keys behind the query, so that `softmax` counts them `a` times. At 0 that is the causal mask, at 1
    the bidirectional one, and both are then computed as such, without a bias.

    As soon as `a` is above 0 the config says `encoder_attention="bidirectional"`. A checkpoint from the middle is
    there to be resumed from: loaded by itself it looks ahead with its full weight, for which it is not trained yet.

    Raises:
        ValueError: what this cannot work with; the message says what to change.
    """

    def __init__(self, trainer) -> None:
        what = f"bidirectional_warmup_steps={trainer.args.bidirectional_warmup_steps}"
        _check_student(trainer.model, what)
        attention = trainer.model.config._attn_implementation
        if attention not in ("eager", "sdpa"):
            raise ValueError(
                f"{what} adds a bias to attention scores, for which attn_implementation={attention!r} has no place. "
                'Use model.set_attn_implementation("sdpa").'
            )
        if trainer.args.torch_compile:
            raise ValueError(
                f"{what} changes the encoder at each step, and torch_compile would trace it again: leave it out."
            )
        if trainer.args.load_best_model_at_end:
            raise ValueError(
                f"{what} with load_best_model_at_end: a checkpoint from the middle does not compute by itself what it "
                "computed in training. Leave it out, and compare the checkpoints after the warm-up."
            )
        self._steps = trainer.args.bidirectional_warmup_steps
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Raises ValueError where the encoder is bidirectional already, or still would not be at the end."""
        if state.max_steps < self._steps:
            raise ValueError(
                f"bidirectional_warmup_steps={self._steps}, but training ends at step {state.max_steps}, before the "
                "encoder is bidirectional."
            )
        if state.global_step == 0 and model.config.encoder_attention != "causal":
            raise ValueError(
                f"bidirectional_warmup_steps={self._steps} with encoder_attention="
                f"{model.config.encoder_attention!r}: there is nothing to change. Begin with a causal encoder, or "
                "leave it out."
            )
        self._set(model, state.global_step)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._set(model, state.global_step)

    def end(self) -> None:
        """The student then computes what a saved one does, also where training ended amid the warm-up."""
        if self._hooks:
            logger.warning(
                f"training ended before step {self._steps} (bidirectional_warmup_steps): the encoder now looks ahead "
                "with its full weight, for which it is not trained yet. Resume from a checkpoint to finish it."
            )
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _set(self, model: PreTrainedModel, step: int) -> None:
        weight = min(1.0, step / self._steps)
        model.config.encoder_attention = "bidirectional" if weight > 0 else "causal"
        self._remove_hooks()
        layers = model.get_encoder().layers
        for layer in layers:
            layer.self_attn.is_causal = weight == 0
        bias = partial(_look_ahead, math.log(weight)) if 0 < weight < 1 else None
        self._hooks = [layer.register_forward_pre_hook(bias) for layer in layers] if bias else []


def _look_ahead(bias: float, layer: nn.Module, inputs: tuple) -> tuple:
    """Inputs of an encoder layer, the mask with `bias` at keys behind the query."""
    hidden_states, position_embeddings, mask = inputs
    length = hidden_states.shape[1]
    ahead = hidden_states.new_full((length, length), bias).triu(1)[None, None]
    if mask is None:
        mask = ahead
    elif mask.dtype == torch.bool:
        mask = torch.where(mask, ahead, torch.finfo(ahead.dtype).min)
    else:
        mask = mask + ahead
    return hidden_states, position_embeddings, mask


def _check_student(student: nn.Module, what: str) -> None:
    config = getattr(student, "config", None)
    if getattr(config, "model_type", None) != "rope_encdec" or getattr(student, "peft_config", None):
        raise ValueError(
            f"{what} needs a student of model_type='rope_encdec' without adapters, got {type(student).__name__}. "
            "Leave it out, or make a student with RopeEncDecForConditionalGeneration.from_decoder_only."
        )


def _check_whole(trainer, what: str) -> None:
    args = trainer.args
    if trainer.is_sharded or args.n_gpu > 1 or args.torch_compile:
        raise ValueError(
            f"{what} takes layers out of a student that is whole on each process: one device or "
            "DistributedDataParallel, no FSDP, DeepSpeed, DataParallel or torch_compile."
        )
    if args.hidden_state_weight > 0:
        raise ValueError(
            f"{what} with hidden_state_weight={args.hidden_state_weight}: which layers of student and teacher belong "
            "together would change with each layer that goes. Leave one of them out."
        )
    if args.auto_find_batch_size:
        raise ValueError(
            f"{what} with auto_find_batch_size, which begins again after layers have gone. Set "
            "per_device_train_batch_size to what fits."
        )
    if args.load_best_model_at_end:
        raise ValueError(
            f"{what} with load_best_model_at_end: the best student would be one from before layers were taken out. "
            "Leave it out, and compare the checkpoints of the final depth."
        )


def _removals(state: TrainerState) -> list[tuple[str, int]]:
    names = {f"removed_{side}_layer": side for side in SIDES}
    return [(names[name], int(log[name])) for log in state.log_history for name in names if name in log]


def _forget(optimizer, gone: list[nn.Parameter]) -> None:
    """Takes parameters and their state out of an optimizer; all else in it stays."""
    ids = {id(parameter) for parameter in gone}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
    for parameter in gone:
        optimizer.state.pop(parameter, None)


def wrap_again(wrapper: DistributedDataParallel, settings) -> None:
    """The same wrapper of a model with other parameters: in place, since the training loop holds it."""
    kwargs = {} if settings is None else settings.to_kwargs()
    # Before the new reducer is made: each takes its hooks off the parameters when it goes.
    del wrapper.reducer, wrapper.logger
    # As `Accelerator.prepare_model` does it (accelerate/accelerator.py, v1.15.0).
    DistributedDataParallel.__init__(
        wrapper, wrapper.module, device_ids=wrapper.device_ids, output_device=wrapper.output_device, **kwargs
    )
    if settings is not None:
        settings.register_comm_hook(wrapper)
