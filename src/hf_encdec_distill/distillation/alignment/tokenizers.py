"""The tokenizers that student and teacher read with, where a script names one of them or none."""

import os

from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from ...models.loading import load_tokenizer
from ...models.prompts import PreTrainedTokenizerFast, prompt_start_token_id, reads_bare_source, student_tokenizer


logger = logging.get_logger(__name__)


def tokenizer_beside(model: "nn.Module | str | os.PathLike", otherwise: str, cls=AutoTokenizer):
    """The tokenizer beside the weights of `model`, or None and a warning, with `otherwise`, if there is none."""
    where = getattr(model.config, "_name_or_path", None) if isinstance(model, nn.Module) else model
    if not where:
        return None
    try:
        return load_tokenizer(where, cls)
    except OSError as error:
        logger.warning(f"no tokenizer at {where!r} ({error}); {otherwise}.")
        return None


def tokenizer_with_prompt(
    given, student: PreTrainedModel, teacher_tokenizer, prompt_template: str | None, prompt_date: str | None
):
    """The tokenizer of a merged student, for `given` without a prompt template, such as the teacher's.

    Its own where it is known; without one that which a student of this prompt has, if it starts where that ends.
    `given` itself where that has other tokens, or no template either.
    """
    own = getattr(student, "tokenizer", None)
    if own is None:
        own = tokenizer_beside(student, "its prompt is taken for that of this training", PreTrainedTokenizerFast)
    if own is None:
        # Not `given`, which may be another's, without a chat template.
        if student.config.decoder_start_token_id != prompt_start_token_id(teacher_tokenizer, prompt_template):
            return given
        own = student_tokenizer(teacher_tokenizer, prompt_template, prompt_date=prompt_date)
    if own.get_vocab() != given.get_vocab() or reads_bare_source(own):
        return given
    logger.warning(
        "processing_class has no prompt template built in: the student keeps its own tokenizer, which has one."
    )
    return own
