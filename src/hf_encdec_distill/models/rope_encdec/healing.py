"""A fit by least squares that is taken only where held-out rows say that it helps, and the scale of the final norm."""

import logging
import math

import torch
from torch.nn import functional as F

from .layer_choice import calibration_batches, measure_teacher
from .least_squares import FITTED, Healing, fit_decoder_only, fit_encoder_decoder
from .teacher_layers import as_causal_encoder


logger = logging.getLogger(__name__)

MEASURED_ROWS = 64  # their log-probabilities over the vocabulary are in memory
_NORM_SCALES = [1.15**step for step in range(-28, 8)]  # 0.02 to 2.7, each 15 % above the last
_HELD_OUT_EVERY = 5
_FITTED_WEIGHTS = tuple(f"{name}.weight" for name in FITTED)


def heal_encoder_decoder(student, teacher, kept, rows, quiet=False) -> Healing | None:
    """Fit the layers that are kept to the teacher's states, in place, unless held-out rows say that it does harm.

    The final norm of a student that was fitted is rescaled on the held-out rows, see `rescale_norm`.

    Args:
        student ([`RopeEncDecForConditionalGeneration`]): Just built, with the layers `kept` of `teacher`; the MLPs
            of its decoder may be narrower.
        teacher ([`PreTrainedModel`]): A decoder-only model of a supported family.
        kept (`dict`): `{"encoder": layers, "decoder": layers}`.
        rows (`list`): From `calibration_rows`; a fifth of them, 64 at most, is held out.

    Returns:
        [`Healing`]: What it brought; `None` where there are too few rows to tell, or no layer had to be fitted.

    Raises:
        ValueError: where a state is not finite.
    """

    def fit(batches):
        config, alone = student.config, None
        if config.cross_attention == "merged" or config.decoder_intermediate_size < config.intermediate_size:
            alone = as_causal_encoder(teacher, kept["decoder"], share_memory=False)
        return fit_encoder_decoder(student, as_causal_encoder(teacher), kept, batches, alone)

    return _unless_it_harms(student, student.model.decoder.norm, teacher, fit, target_logits, rows, quiet)


def heal_decoder_only(student, teacher, kept, rows) -> Healing | None:
    """As `heal_encoder_decoder`, of a decoder-only student with the layers `kept` (`list[int]`) of `teacher`."""

    def fit(batches):
        ours, theirs = (as_causal_encoder(model, windows=True) for model in (student, teacher))
        return fit_decoder_only(ours, theirs, kept, batches)

    return _unless_it_harms(student, student.model.norm, teacher, fit, predicting_logits, rows)


def parted(rows) -> tuple[list, list]:
    """Calibration rows that are held out, a fifth and `MEASURED_ROWS` at most, and those to fit on.

    Each row once, or one that is held out would be fitted too.
    """
    rows = list({(tuple(prompt), tuple(target)): (prompt, target) for prompt, target in rows}.values())
    last = _HELD_OUT_EVERY * MEASURED_ROWS
    fitted = [row for place, row in enumerate(rows) if place % _HELD_OUT_EVERY or place >= last]
    return rows[:last:_HELD_OUT_EVERY], fitted


@torch.no_grad()
def _unless_it_harms(student, norm, teacher, fit, logits, rows, quiet=False) -> Healing | None:
    """Run `fit` on calibration batches; if the student's `logits` are no nearer to the teacher's then, undo it.

    `quiet` is for one among several students, of which the others are thrown away.
    """
    held_out, fitted = parted(rows)
    if not fitted and quiet:
        return None
    if not fitted:
        logger.warning("heal='least_squares' is not taken: one calibration row says nothing. Pass some hundred.")
        return None
    checks = calibration_batches(held_out, student.device)
    teacher_logprobs, _ = measure_teacher(teacher, checks)
    tokens = sum(map(len, teacher_logprobs))
    _, before = best_scale(logits(student, checks), teacher_logprobs)
    # A fit writes into these weights alone; where neurons go, it makes new ones.
    plain = {
        name: tensor.clone() if name.endswith(_FITTED_WEIGHTS) else tensor
        for name, tensor in student.state_dict().items()
    }
    gaps = fit(calibration_batches(fitted, student.device))
    if not gaps:
        return None
    scale, after = best_scale(logits(student, checks), teacher_logprobs)
    healing = Healing(after < before, len(fitted), len(held_out), before / tokens, after / tokens, gaps)
    if healing.taken:
        norm.weight.mul_(scale)
        logger.info("Fitted %d layers by least squares. %s.", len(gaps), healing)
    else:
        student.load_state_dict(plain)
        torch.clear_autocast_cache()
        say = logger.debug if quiet else logger.warning
        say(
            "heal='least_squares' is not taken: it does harm. %s. Pass more calibration rows, or rows of the task.",
            healing,
        )
    return healing


@torch.no_grad()
def target_logits(student, batches):
    """Of an encoder-decoder, `(target tokens, V)` for each batch."""
    for batch in batches:
        yield student(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=batch["decoder_input_ids"],
            use_cache=False,
        ).logits[batch["target_mask"]]


@torch.no_grad()
def predicting_logits(student, batches):
    """Of a decoder-only model, `(target tokens, V)` for each batch."""
    for batch in batches:
        inputs = {"input_ids": batch["sequence"], "attention_mask": batch["sequence_mask"]}
        states = student.model(**inputs, use_cache=False).last_hidden_state
        yield student.lm_head(states[batch["predicting"]])


@torch.no_grad()
def rescale_norm(norm, logits, teacher_logprobs) -> None:
    """Scale a student's final norm, and so the logits, to the least KL from the teacher on the calibration rows.

    A model that lost layers is wrong with the old confidence, one that was fitted to mean states is not confident
    enough; what is scaled is only that, no argmax changes.

    Args:
        logits: An iterable of the student's, `(target tokens, V)` for each batch.
        teacher_logprobs (`list`): From `measure_teacher`.

    Raises:
        ValueError: the student's logits are not finite.
    """
    scale, least = best_scale(logits, teacher_logprobs)
    if least == math.inf:
        raise ValueError(
            "The student's logits on the calibration rows are not finite, as where layers are gone that kept float16 "
            "in its range: load the teacher in float32 or bfloat16, which is then the student's dtype too."
        )
    norm.weight.mul_(scale)


def best_scale(logits, teacher_logprobs) -> tuple[float, float]:
    """The factor on the logits with the least KL from the teacher, and this KL summed over all target tokens; infinite
    where logits are not finite."""
    totals = [0.0] * len(_NORM_SCALES)
    for ours, target in zip(logits, teacher_logprobs):
        for index, scale in enumerate(_NORM_SCALES):
            logprobs = (ours.float() * scale).log_softmax(-1)
            totals[index] += F.kl_div(logprobs, target, reduction="sum", log_target=True).item()
    totals = [total if math.isfinite(total) else math.inf for total in totals]
    least = min(totals)
    return _NORM_SCALES[totals.index(least)], least
