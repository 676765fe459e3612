"""A language model as judge: how good it expects an answer to be, from 1 to 5, read off its next-token distribution.

G-Eval (arXiv 2303.16634, section 2, scoring function): the sum over the five scores of score times probability. Nothing
is sampled and nothing parsed, so that the same rows give the same scores, and a judge that hesitates between 3 and 4 is
not forced to choose.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..models.prompts import encode_rendered, render_prompt
from ._evaluation import Update, batches, left_padded


DIGITS = "12345"
TEMPLATE = """\
You will be given an input, a reference answer and an answer to rate.

Input:
{source}

Reference answer:
{reference}

Answer to rate:
{prediction}

Rate how well the answer to rate does what the reference answer does: is it true of the input, does it say what the \
reference says, is it well written? 1 is worst and 5 is best. Reply with one digit from 1 to 5 and nothing else.

Rating: """


def load_template(given: str | None) -> str:
    """The default, a text with `{prediction}` in it, or what is in a file; one line end at its end is the editor's.

    Raises:
        OSError: neither a file nor a text with `{prediction}`.
        ValueError: a file without `{prediction}`.
    """
    if given is None or "{prediction}" in given:
        return given or TEMPLATE
    text = Path(given).read_text(encoding="utf-8")
    if "{prediction}" not in text:
        raise ValueError(
            f"the judge's template {given} has no {{prediction}}: put it where the answer goes, and {{source}} and "
            "{reference} where you want these"
        )
    return text.removesuffix("\n")


def judge_prompts(
    tokenizer, template: str, rows: Sequence[dict], predictions: Sequence[str], max_length: int | None = None
) -> list[dict]:
    """For each row the token ids of the judge's `prompt`, in its chat template if it has one, and of its five `digits`.

    What comes before the digit is found by writing each of the five behind the prompt, as the tokenizer would have them:
    a space at the end of the prompt may be part of the digit's token.

    Raises:
        ValueError: a digit is not one token, or a prompt is longer than `max_length` tokens.
    """
    found = []
    for row, prediction in zip(rows, predictions, strict=True):
        fields = {"source": row["source"], "reference": row["target"], "prediction": prediction}
        # All at once: a source that has {reference} in it is a text like any other.
        text = re.sub(r"\{(source|reference|prediction)\}", lambda match, fields=fields: fields[match[1]], template)
        rendered = render_prompt(tokenizer, text)
        ids = [encode_rendered(tokenizer, rendered + digit) for digit in DIGITS]
        prompts, digits = {tuple(sequence[:-1]) for sequence in ids}, [sequence[-1] for sequence in ids]
        if len(prompts) > 1 or len(set(digits)) < len(DIGITS):
            raise ValueError(
                "the judge's tokenizer has no token for each of the digits 1 to 5 that would follow its prompt "
                f"(...{rendered[-20:]!r}): end --judge-template otherwise, or take another judge"
            )
        prompt = list(prompts.pop())
        if max_length is not None and len(prompt) > max_length:
            raise ValueError(
                f"a prompt of the judge takes {len(prompt)} tokens and the judge reads {max_length}: leave {{source}} "
                "out of --judge-template, or take another judge"
            )
        found.append({"prompt": prompt, "digits": digits})
    return found


@torch.inference_mode()
def judge(model, prompts: Sequence[dict], update: Update = lambda *_: None) -> tuple[np.ndarray, np.ndarray]:
    """Scores, 1 to 5, and the probability that the judge answers with one of the digits at all, `[rows]` each.

    The score is the mean of the digits under that condition. Where the probability is small it means nothing.
    """
    scores, mass = np.zeros(len(prompts)), np.zeros(len(prompts))
    for indices, batch in batches(prompts, update, "judging"):
        inputs = left_padded([row["prompt"] for row in batch])
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        logits = model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].double()
        digits = logits.gather(1, torch.tensor([row["digits"] for row in batch], device=logits.device))
        values = torch.arange(1.0, len(DIGITS) + 1, dtype=torch.float64, device=logits.device)
        scores[indices] = (digits.softmax(1) @ values).cpu().numpy()
        mass[indices] = (digits.logsumexp(1) - logits.logsumexp(1)).exp().cpu().numpy()
    return scores, mass
