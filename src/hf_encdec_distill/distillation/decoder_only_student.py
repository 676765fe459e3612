"""A student that is a decoder-only model too: what it reads of a batch, and where it predicts the targets.

It reads one sequence as its teacher does, the prompt and then the target. Rows are padded on the left, so that all
targets end in the last column: the head is then needed at the last columns alone (`logits_to_keep`), and a column
counted from the right is the same one in the logits that are kept and in the hidden states.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .alignment.positions import IGNORED, OF_TEACHER, teacher_inputs


if TYPE_CHECKING:
    from .arguments import DistillationTrainingArguments
    from .teachers.live import GenerativeModel

# Arguments that are about an encoder, or about cutting an encoder-decoder.
_OF_ENCODER_DECODERS = (
    "freeze_encoder",
    "freeze_prompt_keys",
    "train_projector_first",
    "cross_attention_warmup_steps",
    "bidirectional_warmup_steps",
    "progressive_depth_steps",
)
# What of a batch goes into the sequence, or is about its parts.
_OF_PARTS = ("input_ids", "attention_mask", "labels", "position_ids", "token_type_ids")
_MOST_NEW_TOKENS = 20  # transformers' default of `max_length`


def is_decoder_only(config) -> bool:
    return not getattr(config, "is_encoder_decoder", False)


def refuse_encoder_options(args: "DistillationTrainingArguments", model_type: str) -> None:
    """Raises ValueError for an argument that means nothing to a decoder-only student."""
    for name in _OF_ENCODER_DECODERS:
        if getattr(args, name):
            raise ValueError(
                f"{name}={getattr(args, name)} is for encoder-decoders, and the student is a decoder-only model "
                f"({model_type}): leave it out, or make an encoder-decoder from that model with "
                "RopeEncDecForConditionalGeneration.from_decoder_only."
            )


def refuse_prompt_learning(model: "GenerativeModel") -> None:
    """Raises ValueError for a PEFT adapter that is a learned prompt.

    PEFT puts it before the row and drops `position_ids` (0.17 always, later versions for most kinds), so that the loss
    would depend on the row's padding.
    """
    for name, config in getattr(model, "peft_config", {}).items():
        if config.is_prompt_learning:
            raise ValueError(
                f"the adapter {name!r} of the student is a learned prompt ({config.peft_type}), and rows of a "
                "decoder-only student are padded between that and their text: use one of weights, such as LoRA."
            )


def sequence_inputs(batch: Mapping[str, Any], accepted: Collection[str]) -> dict[str, Any]:
    """What the student's forward gets of a batch: prompt and target in one, `[B, L]`, and all that is not about these.

    Args:
        batch: `input_ids` and `attention_mask` `[B, S]`, `labels` `[B, T]`.
        accepted: names that the forward takes.

    Raises:
        ValueError: a target without a prompt before it, -100 between the target tokens of a row, or `labels` that are
            the `input_ids` themselves.
    """
    ids, mask, labels = batch["input_ids"], batch.get("attention_mask"), batch["labels"]
    is_target = labels != IGNORED
    if ids.shape == labels.shape and is_target.any() and bool((ids == labels)[is_target].all()):
        raise ValueError(
            "labels repeat input_ids: the trainer puts prompt and target together itself. Give the prompt alone as "
            "input_ids and the target alone as labels, or rows whose labels are -100 at the prompt."
        )
    read = torch.ones_like(ids) if mask is None else mask
    if bool((is_target.any(dim=1) & ~read.bool().any(dim=1)).any()):
        raise ValueError(
            "a row has a target and no prompt: a decoder-only student predicts nothing at its first token."
        )
    sequence = teacher_inputs(ids, read, labels)
    ids, mask = with_padding_left(sequence["teacher_input_ids"], sequence["teacher_attention_mask"])
    of_sequence = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.long().cumsum(dim=1) - 1).clamp(min=0),
        "logits_to_keep": labels.shape[1] + 1,
    }
    others = {n: v for n, v in batch.items() if n not in _OF_PARTS and not n.startswith(("decoder_", OF_TEACHER))}
    return others | {name: value for name, value in of_sequence.items() if name in accepted}


def columns_from_right(labels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The columns, `[N]` below 0, of the student's logits and hidden states that predict labels `[rows, columns]`."""
    return columns - _ends(labels)[rows] - 1


def logits_of_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """`[B, K, V]` as the student gives them -> `[B, T, V]`, column t predicting label t, as of an encoder-decoder.

    Where there is no target token the logits are those of some other column.
    """
    columns = torch.arange(labels.shape[1], device=labels.device) - _ends(labels)[:, None] - 1
    rows = torch.arange(len(labels), device=labels.device)[:, None]
    return logits[rows, columns.clamp(min=-logits.shape[1], max=-1)]


def _ends(labels: Tensor) -> Tensor:
    """`[B]`, the column behind the last target token."""
    span = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return ((labels != IGNORED) * span).amax(dim=1)


def with_padding_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask with the padding moved to the left, and no column of padding alone."""
    order = mask.bool().int().argsort(dim=1, stable=True)[:, -max(int(mask.bool().sum(dim=1).max()), 1) :]
    return ids.gather(1, order), mask.gather(1, order)


@contextmanager
def answers_alone(model: "GenerativeModel") -> Iterator[None]:
    """While the block runs, `model.generate` gives answers without their prompts, which may be padded on either side.

    Its `max_length` is then one of the answer, as for an encoder-decoder.
    """
    generate, own = model.generate, vars(model).get("generate")

    def answers(
        input_ids: Tensor, attention_mask: Tensor | None = None, max_length: int | None = None, **options: Any
    ):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        ids, mask = with_padding_left(input_ids, mask)
        options = {name: value for name, value in options.items() if name not in _OF_PARTS}
        if max_length is None and "generation_config" not in options:
            config = model.generation_config
            max_length = config.max_new_tokens or config.max_length or _MOST_NEW_TOKENS
        if max_length is not None:
            options.setdefault("max_new_tokens", max_length)
        return generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :]

    model.generate = answers  # type: ignore[method-assign]  # put back below
    try:
        yield
    finally:
        if own is None:
            del model.generate
        else:
            model.generate = own  # type: ignore[method-assign]  # what it was
