"""`DistillationCollator`: rows of a dataset -> one batch with the student's inputs and the teacher's side by side."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import DataCollatorForSeq2Seq, default_data_collator
from transformers.utils import logging

from ..models.prompts import check_limit, encode_prompt, prompt_start_token_id, reads_bare_source, with_pad_token
from .alignment.boundaries import offsets_encoder, same_text_so_far, text_boundaries
from .alignment.positions import IGNORED, IMAGES_DIGEST, OF_TEACHER, TEACHER_COLUMNS
from .alignment.vocabularies import SharedVocabulary, UniversalVocabulary
from .checks.packing import refuse_packed
from .images import images_of, one_after_another, refuse_images_of_text
from .teachers.fingerprints import images_digest


logger = logging.get_logger(__name__)

MESSAGES = "messages"
_PROBE = "a"
# Without teacher_input_ids they say nothing, and do no harm.
_OF_LABELS = {"teacher_attention_mask", "teacher_labels_start"}
_READ_OFF_TOKENS = "teacher_mm_token_type_ids"  # which tokens are of images: a live teacher asks the tokens


class DistillationCollator:
    """Tokenises text rows, pads the student's part with an ordinary collator and the `teacher_*` part beside it.

    A row is one of:
    - `source` and `target` texts (`source` may be a list of chat messages too);
    - `messages`, a conversation whose last message is the assistant's and is the target;
    - ready `input_ids` and `labels`, and, if the teacher should read something else, `teacher_input_ids` (its prompt
      and then the target) with `teacher_labels_start` (where the target starts; by default the row ends with it) and
      `teacher_attention_mask` (by default all ones). Without those, the trainer derives what the teacher reads.
      `teacher_label_positions` in place of `teacher_labels_start` say of each label in which column of
      `teacher_input_ids` the teacher predicts it, -1 where it is not asked; what it reads may then be anything.

    A ready row may have images. `pixel_values` are the student's, `(images, 3, H, W)` or of one `(3, H, W)`. Those of
    a teacher that sees are what its own processor makes of the row alone: each `<name>` beside ids and mask in a
    column `teacher_<name>`, nothing taken off, such as `teacher_pixel_values`. Rows of a batch may have different
    numbers of images, or none. Without `teacher_input_ids` the teacher is given the student's.

    Labels are padded on the right, whatever side the student's tokenizer or collator pads on: a decoder that reads
    pads between its start token and the target computes something else.

    Text targets end in EOS. The teacher's prompt is encoded with its own template and tokenizer; the student reads
    that prompt without its last token if it is merged (`start_token_id`), all of it if it is a decoder-only model, its
    own encoding of the source if neither. The keys added to a batch are listed in `alignment`.

    Where student and teacher have different ids (`vocabulary`), the student always reads its own encoding of the
    source, into which a merged student's tokenizer puts the prompt. The teacher reads the student's target tokens
    under its own ids, or, if the vocabulary is universal, its own encoding of the target's text; it is then asked
    about those labels only where both have cut that text at the same place (`boundaries`).

    Args:
        processing_class: the student's tokenizer (or a processor with one); None for ready rows of equal length.
        teacher_processing_class: the teacher's; needed for text rows.
        source_column, target_column: names of the text columns.
        prompt_template, prompt_date: what the teacher reads around the source, see `DistillationTrainingArguments`.
        max_source_length, max_target_length: see `DistillationTrainingArguments`; ready rows are never cut.
        start_token_id: for a merged student, the token its decoder starts with.
        decoder_only: whether the student is a decoder-only model, which reads the whole prompt.
        student_collator: pads rows of `input_ids` and `labels`; by default `DataCollatorForSeq2Seq`.
        keep_text_columns: leave the text columns of ready rows to `student_collator`.
        vocabulary: which ids of the teacher those of the student are; by default the same.
        image_token: of a student that reads images; a text row that has it is refused.

    Raises:
        ValueError: a limit of length is below 1.
    """

    def __init__(
        self,
        processing_class=None,
        teacher_processing_class=None,
        *,
        source_column: str = "source",
        target_column: str = "target",
        prompt_template: str | None = None,
        prompt_date: str | None = None,
        max_source_length: int | None = None,
        max_target_length: int | None = None,
        start_token_id: int | None = None,
        decoder_only: bool = False,
        student_collator: Callable[[list], Mapping[str, Any]] | None = None,
        keep_text_columns: bool = False,
        vocabulary: SharedVocabulary | None = None,
        image_token: str | None = None,
    ):
        check_limit("max_source_length", max_source_length)
        check_limit("max_target_length", max_target_length)
        self.tokenizer = tokenizer_of(processing_class)
        if self.tokenizer is None:
            self.tokenizer = getattr(student_collator, "tokenizer", None)
        self.teacher_tokenizer = tokenizer_of(teacher_processing_class)
        self.source_column = source_column
        self.target_column = target_column
        self.prompt_template = prompt_template
        self.prompt_date = prompt_date
        self.max_source_length = max_source_length
        self.max_target_length = max_target_length
        self.start_token_id = start_token_id
        self.decoder_only = decoder_only
        self.keep_text_columns = keep_text_columns
        self.vocabulary = vocabulary or SharedVocabulary(0, 0)
        self.image_token = image_token
        self._prompt_checked = False
        self._puts_images_together = student_collator is None
        if student_collator is None:
            student_collator = (
                default_data_collator
                if self.tokenizer is None
                else DataCollatorForSeq2Seq(with_pad_token(self.tokenizer))
            )
        self.student_collator = student_collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Rows -> batch; raises ValueError where a row is none of the kinds above or contradicts itself."""
        ready = [self.encode(row) for row in rows]
        columns = ("teacher_input_ids", "teacher_label_positions", "labels")
        if len({tuple(row.get(name) is None for name in columns) for row in ready}) > 1:
            raise ValueError(
                "some rows of the batch have a target, teacher_input_ids or teacher_label_positions and some have "
                "not; give all rows the same columns."
            )
        teacher_rows = [{name: row.pop(name) for name in list(row) if name.startswith(OF_TEACHER)} for row in ready]
        teacher_rows = [{name: value for name, value in row.items() if value is not None} for row in teacher_rows]
        alone = sorted({name for row in teacher_rows if "teacher_input_ids" not in row for name in row} - _OF_LABELS)
        if alone:
            raise ValueError(f"{alone[0]} without teacher_input_ids, which the teacher reads: give those too.")
        reads_alike = "teacher_input_ids" not in teacher_rows[0]
        images: list[dict[str, torch.Tensor]] = []
        if self._puts_images_together or reads_alike:
            images = [images_of(row, "pixel_values") for row in ready]
        if self._puts_images_together:
            ready = [{name: value for name, value in row.items() if name != "pixel_values"} for row in ready]
        batch = {name: value for name, value in self.student_collator(ready).items() if value is not None}
        refuse_packed(batch, len(ready))
        batch = _with_pads_behind_labels(batch, ready)
        if self._puts_images_together:
            batch |= one_after_another(images)
        if "labels" not in batch:
            return batch
        if not reads_alike:
            batch |= _pad_teacher_rows(teacher_rows, ready, batch["labels"], self.vocabulary)
            names = {name for row in teacher_rows for name in row} - {*TEACHER_COLUMNS, _READ_OFF_TOKENS}
            images = [images_of(row, *sorted(names)) for row in teacher_rows]
            batch |= one_after_another(images, batch["teacher_input_ids"].shape[1])
        if any(images):
            batch[OF_TEACHER + IMAGES_DIGEST] = torch.stack([images_digest(of_row) for of_row in images])
        return batch

    def encode(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """One row -> its ready form, lists of ids; a row that is ready already stays as it is."""
        text_columns = (self.source_column, self.target_column, MESSAGES)
        if "input_ids" in row:
            first = row["input_ids"][0] if len(row["input_ids"]) else 0
            if isinstance(first, list | tuple) or getattr(first, "ndim", False):
                raise ValueError(
                    "input_ids of a row have two dimensions, as a processor makes them of a batch: give each row [0] "
                    "of input_ids and attention_mask."
                )
            dropped = () if self.keep_text_columns else text_columns
            ready = {name: value for name, value in row.items() if name not in dropped}
            return _cut_at_target(ready) if self.decoder_only else ready
        refuse_images_of_text(row, self.image_token)
        if row.get(MESSAGES) is not None:
            source, target = split_conversation(row[MESSAGES])
        elif row.get(self.source_column) is not None:
            source, target = row[self.source_column], row.get(self.target_column)
        elif self.source_column in row:
            raise ValueError(f"{self.source_column} of a row is None, expected text: leave such rows out.")
        else:
            raise ValueError(
                f"a row has the columns {sorted(row)}, but needs {self.source_column!r} and {self.target_column!r} "
                f"(named by source_column and target_column), {MESSAGES!r}, or 'input_ids' and 'labels'."
            )
        for column, value, kinds in (
            (self.source_column, source, str | list),
            (self.target_column, target, str | None),
        ):
            if not isinstance(value, kinds):
                raise ValueError(
                    f"{column}={value!r} is of type {type(value).__name__}, expected text (a source may be a list of "
                    "chat messages too): turn the column into text, or name another."
                )
        if self.tokenizer is None or self.teacher_tokenizer is None:
            raise ValueError("text rows need tokenizers: give processing_class (and teacher_processing_class).")
        universal = isinstance(self.vocabulary, UniversalVocabulary)
        # A student with a tokenizer of another kind has a prompt of its own.
        if self.start_token_id is not None and not universal and not self._prompt_checked:
            self._check_student_reads_prompt()
        if self.decoder_only and not universal and not self._prompt_checked:
            self._warn_of_other_prompt()
        if self.prompt_template is None and not self.teacher_tokenizer.chat_template:
            logger.warning_once(
                "the teacher's tokenizer has no chat template, and no prompt_template is given: the teacher reads the "
                "source as it is, with the target right behind it."
            )
        prompt = self._teacher_prompt(source)
        if self.vocabulary.same_ids and self.decoder_only:
            input_ids = prompt
        elif self.vocabulary.same_ids and self.start_token_id is not None:
            input_ids = prompt[:-1]
        else:
            input_ids = self._student_source(source)
        ready = {"input_ids": input_ids, "attention_mask": [1] * len(input_ids)}
        if target is None:
            return ready
        if universal:
            return ready | self._target_of_each(target, prompt)
        labels = self._target(target)
        read = self.vocabulary.to_teacher(torch.tensor(labels)).tolist()
        return ready | {"labels": labels, "teacher_input_ids": prompt + read, "teacher_labels_start": len(prompt)}

    def _teacher_prompt(self, source: str | list[dict]) -> list[int]:
        template_end = prompt_start_token_id(self.teacher_tokenizer, self.prompt_template)
        limit, start = self.max_source_length, self.vocabulary.start_for_teacher(self.start_token_id)
        if start is not None and template_end is None:
            # The start token takes the place of the template's last token, within the limit as that one would be.
            limit = None if limit is None else limit - 1
        prompt = encode_prompt(self.teacher_tokenizer, source, self.prompt_template, limit, self.prompt_date)
        if start is None:
            return prompt
        if template_end is None:
            return [*prompt, start]
        if prompt[-1] != start:
            raise ValueError(
                f"the student's decoder_start_token_id is {start}, but the teacher's prompt ends in {prompt[-1]} (ids "
                "of the teacher). A merged student starts with the last token of its teacher's prompt: train with the "
                "prompt_template (--prompt-template; without one, the chat template) that the student was made with."
            )
        return prompt

    def reads_prompt(self) -> bool:
        """Whether the student's tokenizer knows the prompt: a merged student's has it built in, a decoder-only one's
        has it as its chat template.
        """
        if self.tokenizer is None or self.teacher_tokenizer is None:
            return False
        if self.decoder_only:
            own = encode_prompt(self.tokenizer, _PROBE, prompt_date=self.prompt_date)
            return self.tokenizer.decode(own) == self.teacher_tokenizer.decode(self._teacher_prompt(_PROBE))
        if self.start_token_id is None:
            return False
        try:
            expected = self._teacher_prompt(_PROBE)[:-1]
        except ValueError:  # the student was made with another
            return False
        own = self.tokenizer(_PROBE)["input_ids"]
        if self.vocabulary.same_ids:
            return own == expected
        return self.tokenizer.decode(own) == self.teacher_tokenizer.decode(expected)  # other tokens of the same text

    def _check_student_reads_prompt(self) -> None:
        """A merged student's tokenizer has its prompt built in; that has to be the one it is trained on.

        One that could not hold the template encodes the bare source (`models.prompts.student_tokenizer`) and passes.
        """
        expected = self._teacher_prompt(_PROBE)[:-1]
        bare = self.vocabulary.same_ids and reads_bare_source(self.tokenizer)
        if not self.reads_prompt() and not bare:
            day = "" if self.prompt_date is None else f" and prompt_date (this prompt names {self.prompt_date})"
            raise ValueError(
                f"the student's tokenizer encodes {_PROBE!r} as {self.tokenizer(_PROBE)['input_ids']}, but the "
                f"teacher's prompt for it begins with {expected}. Give the teacher_processing_class (--teacher) and "
                f"prompt_template (--prompt-template){day} that the student was made with."
            )
        self._prompt_checked = True

    def _warn_of_other_prompt(self) -> None:
        if not self.reads_prompt():
            logger.warning(
                "the student's chat template makes another prompt than the teacher's, on which it is trained: "
                "give prompt_template (--prompt-template), or the student's tokenizer the teacher's chat template."
            )
        self._prompt_checked = True

    def _student_source(self, source: str | list[dict]) -> list[int]:
        if self.decoder_only:
            limits = (self.max_source_length, self.prompt_date)
            return encode_prompt(self.tokenizer, source, self.prompt_template, *limits)
        if not isinstance(source, str):
            if self.tokenizer.chat_template is not None:
                prompt = encode_prompt(self.tokenizer, source, None, self.max_source_length, self.prompt_date)
                return prompt[:-1] if prompt[-1] == self.start_token_id else prompt
            if len(source) != 1:
                raise ValueError(
                    f"the student's tokenizer has no chat template to encode {len(source)} messages before the target "
                    "with; set processing_class.chat_template or give a source column."
                )
            source = source[0]["content"]
        limit = self.max_source_length
        if limit is not None and self.start_token_id is not None:
            limit -= 1  # of a merged student the start token is one of the prompt's
        return self.tokenizer(source, truncation=limit is not None, max_length=limit)["input_ids"]

    def _target(self, target: str) -> list[int]:
        return self._ended(self.tokenizer(target, add_special_tokens=False)["input_ids"])

    @cached_property
    def _encoders(self) -> tuple[Tokenizer, Tokenizer]:
        return offsets_encoder(self.tokenizer), offsets_encoder(self.teacher_tokenizer)

    def _target_of_each(self, target: str, prompt: list[int]) -> dict[str, list[int]]:
        """Labels of the student, and the teacher's own encoding with the positions where it predicts them."""
        ours, theirs = (encoder.encode(target, add_special_tokens=False) for encoder in self._encoders)
        cuts = (text_boundaries(encoding.offsets, target) for encoding in (ours, theirs))
        labels = self._ended(ours.ids)
        positions = [-1 if s < 0 else len(prompt) - 1 + s for s in same_text_so_far(*cuts)][: len(labels)]
        return {
            "labels": labels,
            # Nothing is asked behind the last position, so nothing is read there.
            "teacher_input_ids": [*prompt, *theirs.ids][: max(len(prompt), *(p + 1 for p in positions))],
            "teacher_label_positions": positions,
        }

    def _ended(self, ids: list[int]) -> list[int]:
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the student's tokenizer has no eos_token, but text targets end in one; set it.")
        # A cut target did not end there, and neither teacher nor student should be told that it did.
        return [*ids, self.tokenizer.eos_token_id][: self.max_target_length]


def _cut_at_target(row: dict[str, Any]) -> dict[str, Any]:
    """A row as `Trainer` takes it of a decoder-only model, prompt and target in one and labels that are -100 at the
    prompt, as one with the prompt in `input_ids` and the target in `labels`; any other row as it is.
    """
    if row.get("labels") is None or "teacher_input_ids" in row:
        return row
    ids, labels = _as_list(row["input_ids"]), _as_list(row["labels"])
    first = next((column for column, label in enumerate(labels) if label != IGNORED), 0)
    if not first or len(ids) != len(labels) or any(x not in (IGNORED, y) for x, y in zip(labels, ids, strict=True)):
        return row
    of_tokens = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
    prompt = {name: row[name][:first] for name in of_tokens if row.get(name) is not None}
    return {**row, **prompt, "labels": labels[first:]}


def tokenizer_of(processing_class):
    """The tokenizer of a processor, or what was given if it is one (or None)."""
    return getattr(processing_class, "tokenizer", processing_class)


def split_conversation(messages: list[dict]) -> tuple[list[dict], str | None]:
    """A conversation -> what comes before the target, and the target; None if it waits for the assistant's answer.

    Raises:
        ValueError: it is no list of messages with roles, or the target is no text.
    """
    of_dicts = isinstance(messages, list | tuple) and all(isinstance(one, Mapping) for one in messages)
    if not of_dicts or not messages or any("role" not in one for one in messages) or "content" not in messages[-1]:
        raise ValueError(f"{MESSAGES}={messages!r} is not a conversation: a list of dicts with role and content.")
    if messages[-1]["role"] != "assistant":
        return list(messages), None
    if not isinstance(messages[-1]["content"], str):
        raise ValueError(
            f"the last message's content is a {type(messages[-1]['content']).__name__}; the target has to be text."
        )
    return list(messages[:-1]), messages[-1]["content"]


def _with_pads_behind_labels(batch: dict[str, Any], rows: list[dict]) -> dict[str, Any]:
    """The batch with the pads that a collator put in front of `labels` `[B, T]` moved behind them.

    Masks and positions of the decoder move along. Its input does where it has a mask; without one it was made of
    labels that had pads in front, as `DataCollatorForSeq2Seq` makes it, and is left for the trainer to make again.
    """
    labels = batch.get("labels")
    if labels is None or any(row.get("labels") is None for row in rows):
        return batch
    width = labels.shape[1]
    pads = torch.zeros(len(rows), dtype=torch.long)
    for number, (row, padded) in enumerate(zip(rows, labels.tolist(), strict=True)):
        own = _as_list(row["labels"])
        if padded[: len(own)] != own and padded == [IGNORED] * (width - len(own)) + own:
            pads[number] = width - len(own)
    if not pads.any():
        return batch
    if batch.get("decoder_attention_mask") is None:
        batch = {name: value for name, value in batch.items() if name != "decoder_input_ids"}
    columns = (torch.arange(width) + pads[:, None]) % width
    of_decoder = [name for name in batch if name.startswith("decoder_")]
    return batch | {name: batch[name][torch.arange(len(rows))[:, None], columns] for name in ("labels", *of_decoder)}


def _pad_teacher_rows(
    teacher_rows: list[dict], rows: list[dict], labels: torch.Tensor, vocabulary: SharedVocabulary
) -> dict[str, torch.Tensor]:
    """Right-padded `teacher_*`, for right-padded `labels` `[B, T]`; shapes in `alignment`."""
    ids, masks = [], []
    places: list[int | list[int]] = []
    positioned = "teacher_label_positions" in teacher_rows[0]
    for teacher_row, row in zip(teacher_rows, rows, strict=True):
        row_ids = _as_list(teacher_row["teacher_input_ids"])
        row_labels = _as_list(row["labels"])
        ids.append(torch.tensor(row_ids))
        masks.append(torch.tensor(_as_list(teacher_row.get("teacher_attention_mask", [1] * len(row_ids)))))
        if positioned:
            places.append(_label_positions(teacher_row, row_labels, labels.shape[1]))
        else:
            read = vocabulary.to_teacher(torch.tensor(row_labels, dtype=torch.long)).tolist()
            places.append(_labels_start(teacher_row, row_ids, read))
    return {
        "teacher_input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
        "teacher_attention_mask": torch.nn.utils.rnn.pad_sequence(masks, batch_first=True),
        "teacher_label_positions" if positioned else "teacher_labels_start": torch.tensor(places),
    }


def _labels_start(teacher_row: dict, row_ids: list[int], row_labels: list[int]) -> int:
    start = int(teacher_row.get("teacher_labels_start", len(row_ids) - len(row_labels)))
    read = row_ids[max(start, 0) : start + len(row_labels)]
    if (
        start < 1
        or any(label not in (IGNORED, token) for label, token in zip(row_labels, read, strict=False))
        or len(read) != len(row_labels)
    ):
        raise ValueError(
            f"teacher_input_ids {row_ids} do not hold the labels {row_labels} from teacher_labels_start={start} "
            "on; they have to be the teacher's prompt (one token at least) and then the target."
        )
    return start


def _label_positions(teacher_row: dict, row_labels: list[int], width: int) -> list[int]:
    """As long as the padded labels, -1 beside the row's own."""
    positions = _as_list(teacher_row["teacher_label_positions"])
    if len(positions) != len(row_labels):
        raise ValueError(
            f"a row has {len(positions)} teacher_label_positions for {len(row_labels)} labels; give one for each, -1 "
            "where the teacher is not asked."
        )
    return positions + [-1] * (width - len(positions))


def _as_list(values) -> list[int]:
    return values.tolist() if hasattr(values, "tolist") else list(values)
