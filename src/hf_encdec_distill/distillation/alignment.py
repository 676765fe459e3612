"""What has to match between student and teacher before their distributions can be compared: positions and ids.

Positions. The teacher reads one sequence, its prompt and then the target; the student's decoder reads the target
alone. A causal model predicts at column c what stands at column c + 1, so a target that starts at column s of the
teacher's sequence is predicted by columns `[s - 1 : s - 1 + T]`, and these go with the student's labels **unshifted**.
In a batch:

| key | shape | meaning |
|---|---|---|
| `teacher_input_ids` | `[B, L]` | the teacher's prompt, then the target; padded on either side |
| `teacher_attention_mask` | `[B, L]` | 1 where the teacher reads; comes from lengths, never from token ids |
| `teacher_labels_start` | `[B]` | column of `teacher_input_ids` that holds what column 0 of `labels` labels |

So column t of `labels` is predicted at column `teacher_labels_start - 1 + t`, wherever `labels` is not -100. Where the
teacher's target is cut into other tokens, these take the place of the start, which is then not looked at:

| key | shape | meaning |
|---|---|---|
| `teacher_label_positions` | `[B, T]` | column of `teacher_input_ids` whose logits predict the label; -1: not asked |

A label that the teacher is not asked about has a divergence of 0 and still counts: every term of the loss is a mean
over all target tokens.

Vocabulary. `SharedVocabulary` says which ids both sides have; they are the same on both sides, or, for a
`MappedVocabulary`, found by the tokens that they stand for. A `UniversalVocabulary` compares no ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ..models.vocabulary import same_tokens
from .losses import at_least_float32


VOCAB_POLICIES = ("mask_padding", "strict", "id_map", "universal")
TEACHER_COLUMNS = ("teacher_input_ids", "teacher_attention_mask", "teacher_labels_start", "teacher_label_positions")
IGNORED = -100


def target_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column, `[N]` and `[N]`, of the N target tokens of `labels` `[B, T]`: those that are not -100."""
    return (labels != IGNORED).nonzero(as_tuple=True)


def teacher_columns(labels_start: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The columns of the teacher's sequence, `[N]`, whose logits predict labels `[rows, columns]`.

    Args:
        labels_start: `[B]`, `teacher_labels_start` of the batch.
        rows, columns: `[N]` and `[N]`, as from `target_positions`.
    """
    return labels_start[rows] - 1 + columns


def asked_positions(
    inputs: Mapping[str, Tensor], rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Where the teacher is asked about labels `[rows, columns]`: row and column of its sequence, `[M]` and `[M]`.

    Args:
        inputs: a batch with the `teacher_*` tensors.
        rows, columns: `[N]` and `[N]`, as from `target_positions`.

    Returns:
        Row, column, and which of the N labels those M are, `[N]`; None if the teacher is asked about all of them.

    Raises:
        ValueError: `teacher_label_positions` are no columns that the teacher reads, or do not ascend.
    """
    positions = inputs.get("teacher_label_positions")
    if positions is None:
        return rows, teacher_columns(inputs["teacher_labels_start"], rows, columns), None
    if positions.shape != inputs["labels"].shape:
        raise ValueError(
            f"teacher_label_positions have shape {tuple(positions.shape)} and labels {tuple(inputs['labels'].shape)}; "
            "they have to say of each label where the teacher predicts it (-1: nowhere)."
        )
    predicting = positions[rows, columns]
    asked = predicting != -1
    rows, predicting = rows[asked], predicting[asked]
    mask = inputs["teacher_attention_mask"]
    wrong = (predicting < 0) | (predicting >= mask.shape[1])
    wrong |= ~mask.bool()[rows, predicting.clamp(0, mask.shape[1] - 1)]
    # A cache keeps what it recorded of a row in the order of the columns.
    wrong[1:] |= (rows[1:] == rows[:-1]) & (predicting[1:] <= predicting[:-1])
    if bool(wrong.any()):
        row = int(rows[wrong][0])
        raise ValueError(
            f"teacher_label_positions of row {row} are {positions[row].tolist()}; they have to be ascending columns "
            f"of teacher_input_ids that the teacher reads (of {mask.shape[1]} columns it reads {int(mask[row].sum())} "
            "in this row), or -1 for a label that it is not asked about."
        )
    return rows, predicting, asked


def teacher_inputs(
    input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, start_token_id: int | None = None
) -> dict[str, Tensor]:
    """The `teacher_*` tensors of a batch of ready rows: the teacher reads `input_ids`, then `labels`, nothing added.

    Padding on either side of prompt and labels is taken out; what comes back is padded on the right.

    Args:
        input_ids: `[B, S]`.
        attention_mask: `[B, S]`, or None if every token of `input_ids` is read.
        labels: `[B, T]`, -100 where there is no target token.
        start_token_id: the start token of a merged student's decoder, read between the two as that decoder does.

    Raises:
        ValueError: -100 between the target tokens of a row, so that what the teacher should read there is unknown.
    """
    is_target = labels != IGNORED
    count = is_target.sum(dim=1)
    first = is_target.int().argmax(dim=1)
    span = torch.arange(labels.shape[1], device=labels.device)
    inside = (span >= first[:, None]) & (span < (first + count)[:, None])
    if bool((is_target != inside).any()):
        row = int((is_target != inside).any(dim=1).int().argmax())
        raise ValueError(
            f"labels of row {row} have -100 between target tokens: {labels[row].tolist()}. The teacher cannot read a "
            "token that is not there; give the column teacher_input_ids (the teacher's prompt and the whole target)."
        )
    read = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    ids, mask = [input_ids, labels], [read.bool(), is_target]
    if start_token_id is not None:
        ids.insert(1, input_ids.new_full((len(input_ids), 1), start_token_id))
        mask.insert(1, torch.ones_like(ids[1], dtype=torch.bool))
    ids, mask = torch.cat(ids, dim=1), torch.cat(mask, dim=1)
    # A stable sort moves the gaps to the right and keeps the order of all that is read.
    order = (~mask).int().argsort(dim=1, stable=True)[:, : int(mask.sum(dim=1).max())]
    ids, mask = ids.gather(1, order), mask.gather(1, order)
    return {
        "teacher_input_ids": ids.masked_fill(~mask, 0),
        "teacher_attention_mask": mask.to(read.dtype),
        "teacher_labels_start": mask.sum(dim=1) - count - first,
    }


def with_teacher_inputs(
    batch: Mapping[str, Tensor], start_token_id: int | None = None, vocabulary: "SharedVocabulary | None" = None
) -> Mapping[str, Tensor]:
    """The batch if it has the `teacher_*` tensors, else those that `teacher_inputs` derives from it.

    Args:
        batch: `input_ids`, `attention_mask` and `labels` of the student, at least.
        start_token_id: the start token of a merged student's decoder.
        vocabulary: says which ids of the teacher those of the student are; None: the same.
    """
    if batch.get("teacher_input_ids") is not None:
        return batch
    input_ids, mask, labels = batch["input_ids"], batch.get("attention_mask"), batch["labels"]
    if vocabulary is not None and not vocabulary.same_ids:
        input_ids = input_ids if mask is None else input_ids.masked_fill(~mask.bool(), IGNORED)
        input_ids, labels = vocabulary.to_teacher(input_ids), vocabulary.to_teacher(labels)
        start_token_id = vocabulary.start_for_teacher(start_token_id)
    return teacher_inputs(input_ids, mask, labels, start_token_id)


def check_vocab_policy(policy: str) -> None:
    """Raises ValueError if there is no such `vocab_policy`."""
    if policy not in VOCAB_POLICIES:
        raise ValueError(f"vocab_policy={policy!r} is unknown; choose one of {', '.join(VOCAB_POLICIES)}.")


@dataclass(frozen=True)
class SharedVocabulary:
    """The ids that student and teacher both have: all below `size` but `one_sided`.

    Both distributions are taken over these ids alone: an id that only one side has gets probability 0 there, and the
    others share its mass. The cross-entropy is not concerned; it is over all rows of the student.
    """

    size: int
    teacher_size: int
    one_sided: tuple[int, ...] = ()

    same_ids: ClassVar[bool] = True
    # Whether a position counts by the mass that the teacher puts on the shared ids, instead of fully.
    by_mass: ClassVar[bool] = False

    @classmethod
    def between(
        cls,
        student_size: int,
        teacher_size: int,
        student_tokenizer=None,
        teacher_tokenizer=None,
        policy="mask_padding",
    ) -> "SharedVocabulary":
        """Compares rows of the two output embeddings and, where both are given, the two tokenizers.

        Args:
            student_size, teacher_size: rows of the output embeddings; padded rows may differ.
            student_tokenizer, teacher_tokenizer: anything with `get_vocab()`, or None.
            policy: `mask_padding`, or `strict`: no id may be on one side only; `id_map`: a `MappedVocabulary`;
                `universal`: a `UniversalVocabulary`.

        Raises:
            ValueError: an unknown policy; the tokenizers give one id two tokens or one token two ids; `strict` and a
                one-sided id; `id_map` or `universal` without both tokenizers.
        """
        check_vocab_policy(policy)
        if policy in ("id_map", "universal"):
            if student_tokenizer is None or teacher_tokenizer is None:
                raise ValueError(
                    f"vocab_policy={policy!r} aligns two tokenizers, but the "
                    f"{'student' if student_tokenizer is None else 'teacher'}'s is not known: give both "
                    "(processing_class and teacher_processing_class of the trainer)."
                )
            if policy == "universal":
                return UniversalVocabulary(size=student_size, teacher_size=teacher_size)
            return MappedVocabulary.of(student_size, teacher_size, same_tokens(student_tokenizer, teacher_tokenizer))
        size = min(student_size, teacher_size)
        one_sided: tuple[int, ...] = ()
        if student_tokenizer is not None and teacher_tokenizer is not None:
            ours, theirs = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
            _check_same_tokens(ours, theirs)
            one_sided = tuple(sorted(i for i in set(ours.values()) ^ set(theirs.values()) if i < size))
        if policy == "strict" and (student_size != teacher_size or one_sided):
            raise ValueError(
                f"vocab_policy='strict': the student has {student_size} output rows and the teacher {teacher_size}"
                + (f", and ids {list(one_sided[:5])} are in one tokenizer only" if one_sided else "")
                + ". Resize one of them, or set vocab_policy='mask_padding' to compare the shared ids only."
            )
        return cls(size=size, teacher_size=teacher_size, one_sided=one_sided)

    def missing_below(self, size: int) -> list[int]:
        """The ids below `size` that are not shared."""
        return [*self.one_sided, *range(self.size, size)]

    def restrict_student(self, logits: Tensor) -> Tensor:
        """`[..., V]` -> `[..., size]`, the student's logits of the shared ids; -inf at those of one side only."""
        logits = logits[..., : self.size]
        if self.one_sided:
            logits = logits.index_fill(-1, torch.tensor(self.one_sided, device=logits.device), -torch.inf)
        return logits

    def restrict_teacher(self, logits: Tensor) -> Tensor:
        """`[..., V]` -> `[..., size]`, the teacher's logits of the same ids in the same order."""
        return self.restrict_student(logits)

    def places(self, teacher_ids: Tensor) -> Tensor:
        """Where ids of the teacher are in what the two above give; `size` or more for one that is not shared."""
        if self.one_sided:
            one_sided = torch.tensor(self.one_sided, device=teacher_ids.device)
            return teacher_ids.masked_fill(torch.isin(teacher_ids, one_sided), self.size)
        return teacher_ids

    def to_teacher(self, ids: Tensor) -> Tensor:
        """Ids of the student -> the teacher's, of any shape; -100 stays."""
        return ids

    def start_for_teacher(self, start_token_id: int | None) -> int | None:
        """What the teacher reads for the start token of a merged student's decoder."""
        return start_token_id if start_token_id is None else int(self.to_teacher(torch.tensor(start_token_id)))

    def lacks(self, labels: Tensor) -> Tensor:
        """Which of the student's ids are not shared, of any shape."""
        unknown = labels >= self.size
        if self.one_sided:
            unknown |= torch.isin(labels, torch.tensor(self.one_sided, device=labels.device))
        return unknown

    def check(self, labels: Tensor, teacher_input_ids: Tensor) -> None:
        """Raises ValueError for a label that only one side has, or a teacher id beyond the teacher's embedding.

        Args:
            labels: `[N]`, target tokens without -100.
            teacher_input_ids: `[B, L]`.
        """
        unknown = self.lacks(labels)
        beyond = teacher_input_ids >= self.teacher_size
        if bool(unknown.any()):
            raise ValueError(
                f"labels hold id {int(labels[unknown][0])}, which is not in the vocabulary that student and teacher "
                f"share ({self.size} ids"
                + (f" without {list(self.one_sided[:5])}" if self.one_sided else "")
                + "). Encode the targets with tokens that both have, or set such labels to -100 and give "
                "teacher_input_ids."
            )
        if bool(beyond.any()):
            raise ValueError(
                f"teacher_input_ids hold id {int(teacher_input_ids[beyond][0])}, but the teacher has "
                f"{self.teacher_size} ids. Encode the prompt with the teacher's own tokenizer."
            )


@dataclass(frozen=True, eq=False)
class MappedVocabulary(SharedVocabulary):
    """Shared tokens with other ids, as of a student with a trimmed vocabulary: `size` of them, in the teacher's order.

    With p the teacher, q the student, S the shared tokens and m = p(S), the mass that the teacher puts on them, a
    position's divergence is

        m * D(p(. | S), q(. | S))

    for every divergence D. Of the K + 1 events (the shared tokens, and all others of the teacher as one) the student
    can say only the first K, so that a divergence over all of them would be infinite, or reward nothing. This one is
    finite, never negative and 0 exactly if the two agree on what they share; a position where the teacher would say
    something that the student has no token for counts little. For the forward KL its gradient is that of the sum of
    p log(p / q) over S: the one that is left when the tail, which the student cannot help, is taken out. m is 1, and
    the divergence that of `SharedVocabulary`, if all of the teacher's ids are shared.
    """

    teacher_ids: Tensor = None

    same_ids: ClassVar[bool] = False

    @classmethod
    def of(cls, student_size: int, teacher_size: int, pairs: Mapping[int, int]) -> "MappedVocabulary":
        """From ids of the student -> ids of the teacher, one to one; those beyond either embedding are left out."""
        teacher_ids = torch.full((student_size,), -1)
        for ours, theirs in pairs.items():
            if ours < student_size and theirs < teacher_size:
                teacher_ids[ours] = theirs
        return cls(int((teacher_ids >= 0).sum()), teacher_size, teacher_ids=teacher_ids)

    @property
    def by_mass(self) -> bool:
        return self.size < self.teacher_size

    @cached_property
    def _student_order(self) -> Tensor:
        """`[size]`, the student's ids in the order of the teacher's: sums run as they would without a map."""
        shared = (self.teacher_ids >= 0).nonzero().flatten()
        return shared[self.teacher_ids[shared].argsort()]

    @cached_property
    def _places(self) -> Tensor:
        """`[teacher_size]`, `size` for what is not shared."""
        places = torch.full((self.teacher_size,), self.size)
        places[self.teacher_ids[self._student_order]] = torch.arange(self.size)
        return places

    def missing_below(self, size: int) -> list[int]:
        return (self.teacher_ids[:size] < 0).nonzero().flatten().tolist()

    def restrict_student(self, logits: Tensor) -> Tensor:
        return logits.index_select(-1, self._student_order.to(logits.device))

    def restrict_teacher(self, logits: Tensor) -> Tensor:
        if not self.by_mass:
            return logits
        return logits.index_select(-1, self.teacher_ids[self._student_order].to(logits.device))

    def places(self, teacher_ids: Tensor) -> Tensor:
        return self._places.to(teacher_ids.device)[teacher_ids]

    def to_teacher(self, ids: Tensor) -> Tensor:
        mapped = self.teacher_ids.to(ids.device)[ids.clamp(min=0)]
        if bool((mapped[ids != IGNORED] < 0).any()):
            raise ValueError(
                f"the student's id {int(ids[(ids != IGNORED) & (mapped < 0)][0])} stands for a token that the teacher "
                "does not have, so that it cannot read it: encode the row with tokens that both have, or give "
                "teacher_input_ids."
            )
        return mapped.where(ids != IGNORED, IGNORED)

    def lacks(self, labels: Tensor) -> Tensor:
        return self.teacher_ids.to(labels.device)[labels] < 0


class UniversalVocabulary(SharedVocabulary):
    """Two vocabularies of which no ids are compared, only how the mass is spread (`losses.universal_logit_distance`).

    `size` is the student's. What the teacher reads is its own encoding of the target's text, and its positions are
    `teacher_label_positions`; ready rows have to bring both.
    """

    same_ids: ClassVar[bool] = False

    def missing_below(self, size: int) -> list[int]:
        return []

    def restrict_student(self, logits: Tensor) -> Tensor:
        return logits

    def places(self, teacher_ids: Tensor) -> Tensor:
        return teacher_ids

    def to_teacher(self, ids: Tensor) -> Tensor:
        raise ValueError(
            "vocab_policy='universal': ids of the student say nothing to the teacher. Give text rows, or "
            "teacher_input_ids (the teacher's prompt and its own encoding of the target) and teacher_label_positions "
            "(where it predicts each label, -1 for nowhere)."
        )

    def start_for_teacher(self, start_token_id: int | None) -> int | None:
        return None

    def lacks(self, labels: Tensor) -> Tensor:
        return torch.zeros_like(labels, dtype=torch.bool)


def log_mass(part: Tensor, whole: Tensor, temperature: float) -> Tensor:
    """Log of the mass that the distribution of logits `whole` `[..., V]` puts on those of `part` `[..., K]`."""
    part, whole = (x.to(at_least_float32(x.dtype)) / temperature for x in (part, whole))
    return part.logsumexp(dim=-1) - whole.logsumexp(dim=-1)


def _check_same_tokens(ours: dict[str, int], theirs: dict[str, int]) -> None:
    moved = [(token, i, theirs[token]) for token, i in ours.items() if theirs.get(token, i) != i]
    token_at = {i: token for token, i in theirs.items()}
    replaced = [(i, token, token_at[i]) for token, i in ours.items() if token not in theirs and i in token_at]
    if not moved and not replaced:
        return
    examples = [f"{token!r} is {here} for the student and {there} for the teacher" for token, here, there in moved[:3]]
    examples += [f"{i} is {here!r} for the student and {there!r} for the teacher" for i, here, there in replaced[:3]]
    raise ValueError(
        f"student and teacher have different tokenizers: {len(moved) + len(replaced)} of {len(ours)} tokens do not "
        f"match, e.g. {'; '.join(examples)}. Distillation compares distributions id by id: use a student with the "
        "teacher's tokenizer (added tokens and padded rows at the end may differ), vocab_policy='id_map' if its "
        "tokens are the teacher's under other ids, or vocab_policy='universal' if they are not."
    )
