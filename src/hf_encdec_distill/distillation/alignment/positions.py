"""Which column of the teacher's sequence predicts which label of the student.

The teacher reads one sequence, its prompt and then the target; the student's decoder reads the target
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

A teacher that sees is given its images beside its tokens, all those of a batch in the order of its rows:

| key | shape | meaning |
|---|---|---|
| `teacher_<name>`, such as `teacher_pixel_values` | the teacher's own | what its forward takes as `<name>` |
| `teacher_images_digest` | `[B, 16]` | a hash of what the teacher reads of each row beside tokens; 0: nothing |
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor


if TYPE_CHECKING:
    from .vocabularies import SharedVocabulary


OF_TEACHER = "teacher_"  # how the names of all begin that is the teacher's
TEACHER_COLUMNS = ("teacher_input_ids", "teacher_attention_mask", "teacher_labels_start", "teacher_label_positions")
IMAGES_DIGEST = "images_digest"
IGNORED = -100


def target_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column, `[N]` and `[N]`, of the N target tokens of `labels` `[B, T]`: those that are not -100."""
    rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
    return rows, columns


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


def teacher_images(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the teacher is given of a batch beside tokens, by the names that its forward has for it, and the digest."""
    return {
        name.removeprefix(OF_TEACHER): value
        for name, value in inputs.items()
        if name.startswith(OF_TEACHER) and name not in TEACHER_COLUMNS
    }


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
    id_parts, mask_parts = [input_ids, labels], [read.bool(), is_target]
    if start_token_id is not None:
        id_parts.insert(1, input_ids.new_full((len(input_ids), 1), start_token_id))
        mask_parts.insert(1, torch.ones_like(id_parts[1], dtype=torch.bool))
    ids, mask = torch.cat(id_parts, dim=1), torch.cat(mask_parts, dim=1)
    # A stable sort moves the gaps to the right and keeps the order of all that is read.
    order = (~mask).int().argsort(dim=1, stable=True)[:, : int(mask.sum(dim=1).max())]
    ids, mask = ids.gather(1, order), mask.gather(1, order)
    return {
        "teacher_input_ids": ids.masked_fill(~mask, 0),
        "teacher_attention_mask": mask.to(read.dtype),
        "teacher_labels_start": mask.sum(dim=1) - count - first,
    }


def with_teacher_inputs(
    batch: Mapping[str, Tensor], start_token_id: int | None, vocabulary: "SharedVocabulary"
) -> Mapping[str, Tensor]:
    """The batch if it has the `teacher_*` tensors, else those that `teacher_inputs` derives from it.

    A teacher that reads the student's tokens is given the student's images too.

    Args:
        batch: `input_ids`, `attention_mask` and `labels` of the student, at least.
        start_token_id: the start token of a merged student's decoder.
        vocabulary: says which ids of the teacher those of the student are.
    """
    if batch.get("teacher_input_ids") is not None:
        return batch
    input_ids, mask, labels = batch["input_ids"], batch.get("attention_mask"), batch["labels"]
    if not vocabulary.same_ids:
        input_ids = input_ids if mask is None else input_ids.masked_fill(~mask.bool(), IGNORED)
        input_ids, labels = vocabulary.to_teacher(input_ids), vocabulary.to_teacher(labels)
        start_token_id = vocabulary.start_for_teacher(start_token_id)
    images = {name: value for name, value in batch.items() if name == OF_TEACHER + IMAGES_DIGEST}
    if batch.get("pixel_values") is not None:
        images["teacher_pixel_values"] = batch["pixel_values"]
    return teacher_inputs(input_ids, mask, labels, start_token_id) | images
