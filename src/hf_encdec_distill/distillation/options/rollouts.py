"""On-policy distillation: the student's own answers as targets, so that it learns to go on from its own mistakes.

GKD, arXiv 2306.13649, section 3: of some steps the targets are sampled from the student, and the teacher scores those.
All decisions are drawn from the seed and the step alone, so they are the same on every process and after a resume.
"""

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ...models.evaluating import evaluating
from .._compat import let_fsdp2_generate
from ..alignment.positions import IGNORED, OF_TEACHER, teacher_images, teacher_inputs
from ..alignment.vocabularies import SharedVocabulary, vocab_size
from ..checks.limits import room_for_target
from ..decoder_only_student import answers_alone, is_decoder_only
from ..teachers.recorded import CachedTeacher


if TYPE_CHECKING:
    from ..teachers.live import GenerativeModel

_FILE = "replay_buffer-{process}.pt"
# What the targets of a batch are, and what is made of them: a rollout replaces these.
_OF_TARGETS = {"labels", "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"}


class OnPolicy:
    """The steps of a `DistillationTrainer` whose targets the student writes, `on_policy_fraction` of all.

    Raises:
        ValueError: for a teacher that only knows recorded rows, and under FSDP 1 and DeepSpeed.
    """

    def __init__(self, trainer) -> None:
        args = trainer.args
        self._trainer, self.replay = trainer, ReplayBuffer(args.replay_buffer_size)
        if args.on_policy_fraction > 0 and isinstance(trainer.teacher, CachedTeacher):
            raise ValueError(
                f"on_policy_fraction={args.on_policy_fraction} with the cache {trainer.teacher.folder}: nobody can "
                "have recorded what the student is going to write. Give a live teacher."
            )
        if args.on_policy_fraction > 0 and trainer.is_sharded and not trainer.is_fsdp2:
            raise ValueError(
                f"on_policy_fraction={args.on_policy_fraction} with FSDP 1 or DeepSpeed, under which no rollout "
                "has been tried: use FSDP2 (fsdp_version: 2) or DistributedDataParallel."
            )

    def is_due(self, step: int) -> bool:
        args = self._trainer.args
        share = on_policy_fraction_at(step, args.on_policy_fraction, args.on_policy_warmup_steps)
        return draw(args.seed, step, 0) < share

    def batches(self, batches: list[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
        """As many with the student's own targets: written now, or earlier ones again."""
        args, step = self._trainer.args, self._trainer.state.global_step
        if len(self.replay) and draw(args.seed, step, 1) < args.replay_fraction:
            return [self.replay.pick(draw(args.seed, step, 2 + i), device) for i in range(len(batches))]
        return [self.roll_out(batch, step, i) for i, batch in enumerate(batches)]

    def roll_out(self, batch: dict[str, Any], step: int, number: int) -> dict[str, Any]:
        """Batch `number` of the step, with targets that the student writes now; the buffer keeps it."""
        trainer, args = self._trainer, self._trainer.args
        batch = trainer._prepare_inputs(batch)
        trainer.check_weights()  # of NaN no token can be drawn
        let_fsdp2_generate(trainer.model)
        # Each process and each batch of a step draws tokens of its own.
        process = trainer.accelerator.process_index
        with trainer.as_exported():
            rolled = roll_out(
                trainer.accelerator.unwrap_model(trainer.model),
                batch,
                max_new_tokens=self._room(batch),
                temperature=args.sampling_temperature,
                forbidden=trainer._vocabulary.missing_below(vocab_size(trainer.model.config)),
                vocabulary=trainer._vocabulary,
                seed=int(draw(args.seed, step, 1000 + 1000 * process + number) * (1 << 62)),
            )
        self.replay.add(rolled)
        return rolled

    def _room(self, batch: dict[str, Any]) -> int:
        """Tokens that an answer may have: as many as the targets, or as are left of student's or teacher's positions
        behind the longest prompt of the batch."""
        trainer, mask = self._trainer, batch.get("attention_mask")
        longest = batch["input_ids"].shape[1] if mask is None else int(mask.sum(dim=1).max())
        of_teacher = getattr(trainer.teacher, "max_positions", None)  # which reads the prompt and the answer
        rooms = [room_for_target(trainer.model.config, longest), of_teacher and of_teacher - longest]
        limits = [max(room, 1) for room in rooms if room is not None]
        return min([trainer.args.max_target_length or batch["labels"].shape[1], *limits])


def on_policy_fraction_at(step: int, fraction: float, warmup_steps: int) -> float:
    """`fraction`, reached on a straight line from 0 in `warmup_steps` steps."""
    return fraction * min(1.0, step / warmup_steps) if warmup_steps else fraction


def draw(seed: int, step: int, purpose: int) -> float:
    """A number in [0, 1) that depends on nothing else."""
    return float(np.random.default_rng((seed, step, purpose)).random())


def roll_out(
    model: "GenerativeModel",
    batch: Mapping[str, Any],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    forbidden: Sequence[int] = (),
    vocabulary: SharedVocabulary | None = None,
) -> dict[str, Any]:
    """The batch with targets that the student wrote, up to and with EOS, and a teacher that reads those.

    The student runs in eval mode, with its KV cache and without gradient, and is left as it was; the process's random
    numbers are too.

    Args:
        model: the student, unwrapped.
        batch: on the student's device; `labels` `[B, T]` and, if the teacher reads something else than the student,
            `teacher_*`.
        max_new_tokens: most tokens of an answer.
        temperature: of the sampling; 0 is greedy.
        seed: of the sampling.
        forbidden: ids that it may not write, those that the teacher does not have.
        vocabulary: says which ids of the teacher those of the student are; None: the same.

    Returns:
        `labels` `[B, max_new_tokens or fewer]`, -100 after EOS, in place of all that belonged to the old targets.

    Raises:
        ValueError: the batch has `teacher_label_positions`, or `teacher_token_type_ids`.
    """
    if batch.get("teacher_label_positions") is not None:
        raise ValueError(
            "teacher_label_positions with on_policy_fraction above 0: nobody knows where the teacher predicts the "
            "labels of an answer that is not written yet. Leave one of them out."
        )
    images = teacher_images(batch)
    of_tokens = [name for name in images if name.endswith("token_type_ids")]
    if of_tokens:
        raise ValueError(
            f"{OF_TEACHER}{of_tokens[0]} with on_policy_fraction above 0: nobody knows the types of the tokens of an "
            "answer that is not written yet. Leave one of them out."
        )
    inputs = {
        name: value for name, value in batch.items() if name not in _OF_TARGETS and not name.startswith(OF_TEACHER)
    }
    own = model.generation_config
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        use_cache=True,
        suppress_tokens=list(forbidden) or None,
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
        **{f"{name}_token_id": getattr(own, f"{name}_token_id") for name in ("decoder_start", "bos", "eos", "pad")},
    )
    decoder_only = is_decoder_only(model.config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(as_it_was(model, seed))
        stack.enter_context(_generating_by(config, model))
        if decoder_only:
            stack.enter_context(answers_alone(model))
        tokens = model.generate(**inputs, generation_config=config)
    if not decoder_only:
        tokens = tokens[:, 1:]  # without the start token
    labels = _until_eos(tokens, config.eos_token_id)
    rolled = {**inputs, "labels": labels}
    if batch.get("teacher_input_ids") is not None:
        ids, mask = batch["teacher_input_ids"], batch["teacher_attention_mask"]
        # The old target begins where its first label is; labels may be -100 in front of that.
        begin = batch["teacher_labels_start"] + (batch["labels"] != IGNORED).int().argmax(dim=1)
        prompt = mask.bool() & (torch.arange(ids.shape[1], device=ids.device) < begin[:, None])
        of_teacher = labels if vocabulary is None else vocabulary.to_teacher(labels)
        rolled |= teacher_inputs(ids, prompt.to(mask.dtype), of_teacher)
        rolled |= {OF_TEACHER + name: value for name, value in images.items()}
    return rolled


def _until_eos(tokens: Tensor, eos: int | list[int] | None) -> Tensor:
    """-100 after the first EOS of each row, `[B, T] -> [B, T]`."""
    ends = torch.isin(tokens, torch.tensor([] if eos is None else eos, device=tokens.device, dtype=tokens.dtype))
    after = ends.int().cumsum(dim=1) - ends.int() > 0
    return tokens.masked_fill(after, IGNORED)


@contextlib.contextmanager
def _generating_by(config: GenerationConfig, model: "GenerativeModel") -> Iterator[None]:
    """While the block runs, `config` alone decides how the model writes: `generate` fills what a config given to it
    leaves at its default from the model's own, where a teacher's `repetition_penalty` or `top_p` may still be."""
    base = getattr(model, "get_base_model", None)  # of an adapter, whose `generate` hands its config on
    models = [model] if base is None else [model, base()]
    before = [one.generation_config for one in models]
    try:
        for one in models:
            one.generation_config = config
        yield
    finally:
        for one, own in zip(models, before, strict=True):
            one.generation_config = own


@contextlib.contextmanager
def as_it_was(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Eval mode and random numbers of its own inside; module by module as before outside."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), evaluating(model):
        torch.manual_seed(seed)
        yield


class ReplayBuffer:
    """The last rollouts of this process, which a later step may learn from again (DistiLLM, arXiv 2402.03898, 3.2).

    Args:
        size: batches kept; 0 keeps none.
    """

    def __init__(self, size: int):
        self._batches: deque[dict[str, Tensor]] = deque(maxlen=size)

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, batch: Mapping[str, Any]) -> None:
        if self._batches.maxlen:
            kept = {name: value.detach().cpu() for name, value in batch.items() if isinstance(value, Tensor)}
            self._batches.append(kept)

    def pick(self, number: float, device: torch.device) -> dict[str, Tensor]:
        """The batch at `number`, 0 to below 1, of the way through the buffer."""
        return {name: value.to(device) for name, value in self._batches[int(number * len(self))].items()}

    def save(self, folder: str | Path, process: int) -> None:
        if self._batches.maxlen:
            torch.save(list(self._batches), Path(folder) / _FILE.format(process=process))

    def load(self, folder: str | Path, process: int) -> None:
        """Raises ValueError where a checkpoint of a run with a buffer has none."""
        file = Path(folder) / _FILE.format(process=process)
        if not self._batches.maxlen:
            return
        if not file.is_file():
            raise ValueError(
                f"{folder} has no {file.name}: it was written without replay_buffer_size, with save_only_model, or by "
                "fewer processes. Continue from a checkpoint that has one, or without replay_buffer_size."
            )
        self._batches.extend(torch.load(file, weights_only=True))
