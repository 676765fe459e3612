"""A language model as judge: how good it expects an answer to be, from 1 to 5, read off its next-token distribution.

G-Eval (arXiv 2303.16634, section 2, scoring function): the sum over the five scores of score times probability.
Nothing is sampled and nothing parsed: the same rows give the same scores, and a judge that hesitates between 3 and 4
need not choose.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ..devices import device, working_dtype
from ..models.loading import load_config, load_teacher, load_tokenizer
from ..models.prompts import encode_rendered, render_prompt
from ..progress import progress
from .scoring import Update, batches, left_padded


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
        OSError: a file that cannot be read.
        ValueError: a file or a text without `{prediction}`.
    """
    if given is None or "{prediction}" in given:
        return given or TEMPLATE
    if not Path(given).exists():
        raise ValueError(
            f"the judge's template {given!r} is no file, nor has it {{prediction}}, which stands where the answer goes"
        )
    text = Path(given).read_text(encoding="utf-8")
    if "{prediction}" not in text:
        raise ValueError(
            f"the judge's template {given} has no {{prediction}}: put it where the answer goes, and {{source}} and "
            "{reference} where you want these"
        )
    return text.removesuffix("\n")


class Judge:
    """A causal language model that rates answers.

    Its tokenizer and the template are tried on the rows' own targets at once; `rate` loads the weights.

    Args:
        path: folder or Hub id.
        template: see `load_template`.
        rows: `source` and `target` of each.

    Raises:
        ValueError: one of the digits 1 to 5 is not one token, or a prompt is longer than the judge can read.
    """

    def __init__(self, path: str, template: str | None, rows: Sequence[Mapping[str, str]]):
        self.path, self.template, self.rows = path, load_template(template), rows
        self.tokenizer = load_tokenizer(path)
        config = load_config(path).get_text_config(decoder=True)
        self.max_length = getattr(config, "max_position_embeddings", None)
        self.prompts([row["target"] for row in rows])

    def prompts(self, answers: Sequence[str]) -> list[dict]:
        """Token ids for each row: the `prompt`, in the judge's chat template if it has one, and the five `digits`.

        They are found by writing each digit behind the prompt, as the tokenizer would have it: a space at the end of
        the prompt may be part of the digit's token.
        """
        found = []
        for row, answer in zip(self.rows, answers, strict=True):
            fields = {"source": row["source"], "reference": row["target"], "prediction": answer}
            text = render_prompt(self.tokenizer, _filled(self.template, fields))
            ids = [encode_rendered(self.tokenizer, text + digit) for digit in DIGITS]
            prompts, digits = {tuple(sequence[:-1]) for sequence in ids}, [sequence[-1] for sequence in ids]
            if len(prompts) > 1 or len(set(digits)) < len(DIGITS):
                raise ValueError(
                    f"the tokenizer of the judge {self.path} has no token for each of the digits 1 to 5 after "
                    f"{text[-20:]!r}: end --judge-template otherwise, or take another judge"
                )
            prompt = list(prompts.pop())
            if self.max_length is not None and len(prompt) > self.max_length:
                raise ValueError(
                    f"the judge {self.path} reads {self.max_length} tokens and would get {len(prompt)}: leave "
                    "{source} out of --judge-template, or take another judge"
                )
            found.append({"prompt": prompt, "digits": digits})
        return found

    def rate(self, answers: Mapping[str, Sequence[str]]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """What it gives the answers of each model, which are in the order of the rows.

        Returns:
            Scores, `[rows]` from 1 to 5: the mean of the digits, given that it answers with one. And the probability
            of that, the mean over the rows: where it is small the scores mean nothing.
        """
        model = load_teacher(self.path, dtype=working_dtype()).to(device())
        rated = {}
        for name, texts in answers.items():
            with progress(name) as update:
                rated[name] = score_digits(model, self.prompts(texts), update)
        scores = {name: values for name, (values, _) in rated.items()}
        of_digits = {name: float(values.mean()) for name, (_, values) in rated.items()}
        if min(of_digits.values()) < 0.5:
            print(
                f"the judge writes a digit from 1 to 5 with a probability of {min(of_digits.values()):.2f} only, "
                "and its scores say little: end --judge-template so that a digit has to follow, or take another",
                file=sys.stderr,
            )
        return scores, of_digits


def _filled(template: str, fields: Mapping[str, str]) -> str:
    # All at once: a source that has {reference} in it is a text like any other.
    return re.sub(r"\{(source|reference|prediction)\}", lambda hit: fields[hit[1]], template)


@torch.inference_mode()
def score_digits(
    model, prompts: Sequence[dict[str, list[int]]], update: Update = lambda *_: None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the digits that may follow each prompt, and the probability that one of them does, `[rows]` each."""
    scores, of_digits = np.zeros(len(prompts)), np.zeros(len(prompts))
    for indices, batch in batches(prompts, update, "judging"):
        inputs = {name: x.to(model.device) for name, x in left_padded([row["prompt"] for row in batch]).items()}
        logits = model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].double()
        digits = logits.gather(1, torch.tensor([row["digits"] for row in batch], device=logits.device))
        values = torch.arange(1.0, len(DIGITS) + 1, dtype=digits.dtype, device=digits.device)
        scores[indices] = (digits.softmax(1) @ values).cpu().numpy()
        of_digits[indices] = (digits.logsumexp(1) - logits.logsumexp(1)).exp().cpu().numpy()
    return scores, of_digits
