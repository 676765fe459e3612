"""Which ids student and teacher have in common, so that their distributions are over the same events.

The ids of a `SharedVocabulary` are the same on both sides; those of a `MappedVocabulary` are found by the tokens that
they stand for; a `UniversalVocabulary` compares no ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ...models.vocabulary import same_tokens
from ..losses import at_least_float32
from .positions import IGNORED


VOCAB_POLICIES = ("mask_padding", "strict", "id_map", "universal")


def check_vocab_policy(policy: str) -> None:
    """Raises ValueError if there is no such `vocab_policy`."""
    if policy not in VOCAB_POLICIES:
        raise ValueError(f"vocab_policy={policy!r} is unknown; choose one of {', '.join(VOCAB_POLICIES)}.")


def vocab_size(config) -> int:
    """Rows of a model's output embedding, text part."""
    size = getattr(config, "vocab_size", None)
    return size if size is not None else config.get_text_config(decoder=True).vocab_size


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

    @property
    def by_mass(self) -> bool:
        """Whether a position counts by the mass that the teacher puts on the shared ids, instead of fully."""
        return False

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
        if bool(unknown.any()):
            raise ValueError(
                f"labels hold id {int(labels[unknown][0])}, which is not in the vocabulary that student and teacher "
                f"share ({self.size} ids"
                + (f" without {list(self.one_sided[:5])}" if self.one_sided else "")
                + "). Encode the targets with tokens that both have, or set such labels to -100 and give "
                "teacher_input_ids."
            )
        check_teacher_ids(teacher_input_ids, self.teacher_size)


def check_teacher_ids(teacher_input_ids: Tensor, size: int) -> None:
    """Raises ValueError for an id, in a tensor of any shape, that a teacher with `size` of them does not have."""
    beyond = teacher_input_ids >= size
    if bool(beyond.any()):
        raise ValueError(
            f"teacher_input_ids hold id {int(teacher_input_ids[beyond][0])}, but the teacher has {size} ids. Encode "
            "the prompt with the teacher's own tokenizer."
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

    teacher_ids: Tensor = field(kw_only=True)

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
