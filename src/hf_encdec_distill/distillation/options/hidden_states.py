"""The student's decoder hidden states, matched with the teacher's through projections that are trained beside it.

Layers are named as in the `hidden_states` that transformers' models give: 0 is the embedding, i what layer i (counted
from 1) hands on, and the last one has the final norm applied. States are compared where the loss compares logits: at
the student's decoder position that predicts a target token, and the teacher's position that predicts the same token.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast, extract_model_from_parallel
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from ..arguments import steps_in_backward
from ..losses import HIDDEN_STATE_LOSSES, at_least_float32
from ..teachers.recorded import CachedTeacher
from ..teachers.served import ServedTeacher


if TYPE_CHECKING:
    from ..arguments import DistillationTrainingArguments
    from ..checks.finite_training import FiniteTraining as _Trainer
    from ..teachers.live import LiveTeacher
else:
    _Trainer = object

FILE = "hidden_state_projections.pt"


class HiddenStateMatching(nn.Module):
    """A projection `[W, H]` for each pair of layers, and the mean of the pairs' losses.

    The projections start as the identity where both widths are equal, and semi-orthogonal otherwise. They belong to
    the trainer: its optimizer moves them, its checkpoints hold them in `FILE`, and the student never sees them.

    Args:
        layers: layer of the student's decoder -> layer of the teacher; empty: nothing is matched.
        student_width, teacher_width: H and W.
        loss: a key of `losses.HIDDEN_STATE_LOSSES`.
        dtype: of the student; half precision is projected in float32.
    """

    def __init__(
        self,
        layers: Mapping[int, int],
        student_width: int = 0,
        teacher_width: int = 0,
        loss: str = "mse",
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.student_layers, self.teacher_layers = tuple(layers), tuple(layers.values())
        self.loss = HIDDEN_STATE_LOSSES[loss]
        self.projections = nn.ParameterList(
            torch.empty(teacher_width, student_width, dtype=at_least_float32(dtype)) for _ in layers
        )
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Puts the projections back where they start, equal on every process."""
        # A generator of their own: the run's dropout and shuffling do not depend on whether states are matched.
        generator = torch.Generator().manual_seed(0)
        for projection in self.parameters():
            if projection.shape[0] == projection.shape[1]:
                nn.init.eye_(projection)
            else:
                start = torch.empty_like(projection, device="cpu")
                projection.copy_(nn.init.orthogonal_(start, generator=generator))
                broadcast(projection.data)  # the decomposition may round otherwise on another machine

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], asked: Tensor | None = None) -> Tensor:
        """`[N, H]` of the student and `[M, W]` of the teacher for each pair of layers -> `[N]`.

        Args:
            asked: `[N]`, where the teacher has a state, at M of the N positions (at all if None); 0 elsewhere.
        """
        per_pair = []
        with torch.autocast(student[0].device.type, enabled=False):
            for ours, theirs, projection in zip(student, teacher, self.projections, strict=True):
                ours = ours if asked is None else ours[asked]
                projected = F.linear(ours.to(projection.dtype), projection)
                per_pair.append(self.loss(projected, theirs.to(projected)))
            values = torch.stack(per_pair).mean(dim=0)
        return values if asked is None else values.new_zeros(len(asked)).masked_scatter(asked, values)

    def is_in(self, optimizer: Any) -> bool:
        """Whether `optimizer` has the projections."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return all(id(projection) in held for projection in self.parameters())

    def average_gradients(self, accelerator: Accelerator) -> None:
        """What DistributedDataParallel does for the student, which is all that it wraps."""
        if accelerator.num_processes == 1:
            return
        for projection in self.parameters():
            projection.grad = accelerator.reduce(projection.grad, reduction="mean")

    def save(self, folder: str) -> None:
        if self.student_layers:
            torch.save(self.state_dict(), Path(folder) / FILE)

    def load(self, folder: str) -> None:
        """Raises ValueError if the checkpoint has no projections, or those of other layers or widths."""
        if not self.student_layers:
            return
        file = Path(folder) / FILE
        if not file.is_file():
            raise ValueError(
                f"checkpoint {folder} has no {FILE}: it was saved without hidden_state_weight, or with "
                "save_only_model. Give its weights as the model and start a new run, without resume_from_checkpoint."
            )
        try:
            self.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        except RuntimeError as error:
            raise ValueError(
                f"the projections in {file} are not those of this run ({error}); resume with the same "
                "hidden_state_layers, student and teacher."
            ) from error


class _AreTrained(TrainerCallback):
    """Raises ValueError where training begins with an optimizer that does not have the projections."""

    def __init__(self, matching: HiddenStateMatching, said: str):
        self._matching, self._said = matching, said

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        if not self._matching.is_in(optimizer):
            raise ValueError(
                f"{self._said}, but the optimizer does not hold the projections, which would stay as they are: "
                "let create_optimizer or create_scheduler of a subclass call that of DistillationTrainer, or give "
                "optimizers=(optimizer, None)."
            )


class HiddenStateTraining(_Trainer):
    """Mix-in for a distilling `Trainer`: what is done for the student is done for the projections of hidden states.

    They get a group in the optimizer, an average over processes once a step, the same clipping, a check for what is
    not finite, and a file in each checkpoint.
    """

    args: "DistillationTrainingArguments"
    model: PreTrainedModel
    teacher: "LiveTeacher | CachedTeacher | ServedTeacher"
    _matching: HiddenStateMatching

    def _match_hidden_states(self) -> None:
        """Makes the projections that `args` ask for, none with `hidden_state_weight=0`."""
        self._matching = HiddenStateMatching({})
        if self.args.hidden_state_weight == 0:
            return
        if isinstance(self.teacher, CachedTeacher):
            raise ValueError(
                f"hidden_state_weight={self.args.hidden_state_weight} with the cache {self.teacher.folder}, which "
                "holds distributions and no hidden states. Give a live teacher."
            )
        if isinstance(self.teacher, ServedTeacher):
            raise ValueError(
                f"hidden_state_weight={self.args.hidden_state_weight} with a teacher on a server, which gives "
                "log-probabilities and no hidden states. Give a teacher that is here."
            )
        refuse_hidden_states(self)
        student, teacher = self.accelerator.unwrap_model(self.model), self.teacher.model
        asked = self.args.hidden_state_layers  # a mapping by now, if it was text
        layers = layer_pairs(student, teacher, asked if isinstance(asked, dict) else None)
        loss, dtype = self.args.hidden_state_loss, student.dtype
        self._matching = HiddenStateMatching(layers, *widths(student, teacher), loss, dtype).to(self.args.device)
        if self.optimizer is not None:
            self.optimizer.add_param_group(self._projection_group())
        self.add_callback(_AreTrained(self._matching, f"hidden_state_weight={self.args.hidden_state_weight}"))

    def _projection_group(self) -> dict[str, Any]:
        return {"params": list(self._matching.parameters()), "weight_decay": self.args.weight_decay}

    def named_weights(self) -> Iterable[tuple[str, Tensor]]:
        return chain(super().named_weights(), self._matching.named_parameters())

    def create_optimizer(self, *args, **kwargs):
        """As the base class, with a group for the projections."""
        optimizer = super().create_optimizer(*args, **kwargs)
        self._give_projections()
        return optimizer

    def create_scheduler(self, *args, **kwargs):
        """As the base class; an optimizer that a subclass has made of the student gets the projections too."""
        self._give_projections()
        return super().create_scheduler(*args, **kwargs)

    def _give_projections(self) -> None:
        """To a new optimizer."""
        optimizer = self.optimizer
        if optimizer is not None and self._matching.student_layers and not self._matching.is_in(optimizer):
            self._matching.reset()  # `model_init` has made a new student too
            optimizer.add_param_group(self._projection_group())

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.hidden_state_weight == 0:
            return
        clip = self.accelerator.clip_grad_norm_

        # The base class clips what it finds in the student; the norm is that of all that is trained.
        def clip_with_projections(parameters, *args, **kwargs):
            return clip([*parameters, *self._matching.parameters()], *args, **kwargs)

        self.accelerator.clip_grad_norm_ = clip_with_projections

    def get_batch_samples(self, *args, **kwargs):
        self._matching.zero_grad()  # a step begins
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args, **kwargs) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self._matching.average_gradients(self.accelerator)
        return loss

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self._matching.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._matching.load(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = self.state.best_model_checkpoint
        if best is not None and not self.args.save_only_model:
            self._matching.load(best)


def layer_pairs(
    student: PreTrainedModel, teacher: PreTrainedModel, layers: Mapping[int, int] | None
) -> dict[int, int]:
    """Layer of the student's decoder -> layer of the teacher: `layers` if they exist, or evenly spaced.

    Evenly: layer i of S goes with layer i T / S of the teacher's T, rounded (TinyBERT's uniform strategy, arXiv
    1909.10351, section 4.4), so that the last goes with the last.

    Raises:
        ValueError: `layers` is empty, or names a layer that one of the two does not have.
    """
    # No config field has the decoder's depth in all families (T5's, BART's and ours are three), its modules do.
    of_student = len(next(m for m in student.get_decoder().modules() if isinstance(m, nn.ModuleList)))
    of_teacher = teacher.config.get_text_config(decoder=True).num_hidden_layers
    if layers is None:
        return {i: (2 * i * of_teacher + of_student) // (2 * of_student) for i in range(1, of_student + 1)}
    wrong = [(i, j) for i, j in layers.items() if not (0 <= i <= of_student and 0 <= j <= of_teacher)]
    if wrong or not layers:
        raise ValueError(
            f"hidden_state_layers={layers}: "
            + (f"there is no pair {wrong[0]}" if wrong else "no pair")
            + f"; map layers of the student's decoder, 0 (its embedding) to {of_student}, to layers of the teacher, "
            f"0 to {of_teacher}, or leave it out for evenly spaced ones."
        )
    return dict(layers)


def widths(student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[int, int]:
    """Hidden size of the student's decoder and of the teacher."""
    return student.get_decoder().config.hidden_size, teacher.config.get_text_config(decoder=True).hidden_size


def refuse_hidden_states(trainer) -> None:
    """Raises ValueError where a `DistillationTrainer` can't match hidden states, or can't train projections."""
    args = trainer.args
    weight = f"hidden_state_weight={args.hidden_state_weight}"
    sharded = trainer.is_sharded or trainer.get_tp_size() > 1
    if sharded or args.n_gpu > 1 or getattr(trainer, "is_distributed_loading_by_transformers", False):
        raise ValueError(
            f"{weight} needs a whole student on each process, since its projections are trained beside it: use "
            "DistributedDataParallel instead of FSDP, DeepSpeed, tensor parallelism or several GPUs in a process."
        )
    if trainer.lr_scheduler is not None:
        raise ValueError(
            f"{weight} with a scheduler of your own, which knows nothing of the projections that the optimizer is "
            "going to train: give optimizers=(optimizer, None), or neither."
        )
    if steps_in_backward(args):
        raise ValueError(
            f"{weight} with optim={args.optim.value!r}, which updates the student's weights in their backward and "
            "nothing else: choose another optimizer."
        )


@contextmanager
def catch_hidden_states(
    model: nn.Module, layers: Sequence[int], rows: Tensor, columns: Tensor
) -> Iterator[list[Tensor]]:
    """While the block runs, a forward of `model` leaves its states at `[rows, columns]`, `[N, H]` for each layer.

    `model` may be wrapped or compiled: it is asked from outside, with `output_hidden_states`. Its output is what it
    would have been without.

    Args:
        layers: of the decoder; if empty, nothing is asked for.
        rows, columns: `[N]` each.
    """
    caught: list[Tensor] = []
    if not layers:
        yield caught
        return
    wanted_anyway = getattr(extract_model_from_parallel(model).config, "output_hidden_states", False)

    def ask(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {**kwargs, "output_hidden_states": True, "return_dict": True}

    def pick(_module: nn.Module, _args: tuple, output):
        states = output["decoder_hidden_states" if "decoder_hidden_states" in output else "hidden_states"]
        caught[:] = [states[i][rows.to(states[i].device), columns.to(states[i].device)] for i in layers]
        if wanted_anyway:
            return output
        return type(output)(**{name: value for name, value in output.items() if not name.endswith("hidden_states")})

    handles = model.register_forward_pre_hook(ask, with_kwargs=True), model.register_forward_hook(pick)
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()
