"""The proof that an exported folder answers as PyTorch does: logits, tokens, cross-entropy on rows, time, size."""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..models.rope_encdec.compat_rope_encdec import CACHE_FIELD
from .recipe import BOUNDS, Shapes, that_fit
from .runtime import ExportedForConditionalGeneration


BEAMS = 3
_ROUNDS = 5


def prove(
    folder: Path,
    model,
    rows: Sequence[Mapping[str, Any]],
    tokenizer=None,
    max_new_tokens: int = 32,
    update: Callable[[float, str], None] = lambda *_: None,
) -> dict[str, Any]:
    """Compare an exported folder with the model that it was made from.

    Args:
        model: the [`RopeEncDecForConditionalGeneration`], in fp32.
        rows: real rows, `inputs` (prompt token ids) and `labels` (target token ids with EOS), and `target` (text) for
            ROUGE-L.
        tokenizer: turns tokens into the texts that ROUGE-L compares. Without it, or without the package rouge-score,
            there is no ROUGE-L.

    Returns:
        `shapes` (a row for each shape of the grid: `max` and `mean` difference of logits, as a share of the largest),
        `logits` (the largest of them), `tokens` (`greedy` and `beam`, shares of equal answers), `ce` and `agreement`
        on the rows, `rouge_l`, `seconds`, `megabytes`, `bounds`, and `failures`: sentences, empty if all is within.
    """
    exported = ExportedForConditionalGeneration.from_pretrained(folder)
    manifest = exported.manifest
    model = model.float().eval()
    bounds = BOUNDS[manifest["variant"]]
    shapes = exported.graphs.shapes
    rows = that_fit(rows, shapes)
    update(0.0, "logits over a grid of shapes")
    grid = compare_logits(exported, model, shapes)
    update(0.3, f"greedy and beam answers to {len(rows)} rows")
    tokens, rouge_l = compare_answers(exported, model, rows, shapes, tokenizer, max_new_tokens)
    update(0.7, "cross-entropy on the rows")
    ce, agreement = compare_on_rows(exported, model, rows)
    update(0.9, "time")
    seconds = {"pytorch": time_answer(model, rows), "exported": time_answer(exported, rows)}
    report = {
        "target": manifest["target"],
        "variant": manifest["variant"],
        "shapes_taken": manifest["shapes"],
        "shapes": grid,
        "logits": max(case["max"] for case in grid),
        "tokens": tokens,
        "ce": ce,
        "agreement": agreement,
        **({} if rouge_l is None else {"rouge_l": rouge_l}),
        "rows": len(rows),
        "seconds": seconds,
        "megabytes": {
            "exported": sum((folder / name).stat().st_size for name in manifest["files"]) / 1e6,
            "pytorch_fp32": sum(p.numel() for p in model.parameters()) * 4 / 1e6,
        },
        "bounds": dataclasses.asdict(bounds),
    }
    report["failures"] = _failures(report, bounds)
    update(1.0, "done")
    return report


def _failures(report: Mapping[str, Any], bounds) -> list[str]:
    """What is out of bounds. Written so that a NaN fails."""
    ce, tokens = report["ce"], report["tokens"]
    rise = ce["exported"] / ce["pytorch"] - 1
    checks = {
        f"logits differ by {report['logits']:.2g} of the largest, bound {bounds.logits}": bounds.logits is None
        or report["logits"] <= bounds.logits,
        f"cross-entropy rises by {rise:.2%}, bound {bounds.ce:.2%}": rise <= bounds.ce,
        f"top token agrees at {report['agreement']:.2%} of target tokens, bound {bounds.agreement:.2%}": (
            report["agreement"] >= bounds.agreement
        ),
        **{
            f"{tokens[way]:.2%} of {way} answers are equal, bound {bounds.tokens:.2%}": tokens[way] >= bounds.tokens
            for way in tokens
        },
    }
    return [sentence for sentence, holds in checks.items() if not holds]


@torch.no_grad()
def compare_logits(exported, model, shapes: Shapes) -> list[dict[str, Any]]:
    """Teacher-forced logits on random tokens over a grid of batch, prompt and target lengths, 1 included, with pads on
    either side, on one loaded model."""
    generator = torch.Generator().manual_seed(0)
    longest, slots = max(shapes.prompts or (48,)), shapes.targets or 16
    cases = []
    for batch, prompt, target in (
        (1, 1, 1),
        (1, longest, min(2, slots)),
        (2, min(7, longest), min(5, slots)),
        (3, 2, 1),
    ):
        for side in ("none", "left", "right") if prompt > 1 and batch > 1 else ("none",):
            ids = torch.randint(model.config.vocab_size, (batch, prompt), generator=generator)
            labels = torch.randint(model.config.vocab_size, (batch, target), generator=generator)
            mask = torch.ones_like(ids)
            if side != "none":  # row i has i pads, as far as something is left
                for row in range(batch):
                    pads = min(row, prompt - 1)
                    mask[row, slice(0, pads) if side == "left" else slice(prompt - pads, None)] = 0
            inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": labels}
            expected, found = model(**inputs).logits, exported(**inputs).logits
            difference = (found - expected).abs() / expected.abs().max()
            shape = {"batch": batch, "prompt": prompt, "target": target, "pads": side}
            cases.append(shape | {"max": float(difference.max()), "mean": float(difference.mean())})
    return cases


@torch.no_grad()
def compare_answers(
    exported, model, rows: Sequence[Mapping], shapes: Shapes, tokenizer, max_new_tokens: int
) -> tuple[dict[str, float], dict[str, float] | None]:
    """Shares of rows whose greedy and beam answers are equal to the last token, and ROUGE-L of the greedy ones."""
    options = {"max_new_tokens": min(max_new_tokens, shapes.targets or max_new_tokens), "do_sample": False}
    equal: dict[str, list[bool]] = {"greedy": [], "beam": []}
    texts: dict[str, list[str]] = {"pytorch": [], "exported": []}
    for row in rows:
        ids = torch.tensor([row["inputs"]])
        for way, beams in (("greedy", 1), ("beam", BEAMS)):
            expected, found = (
                one.generate(input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=beams, **options)[
                    0
                ].tolist()
                for one in (model, exported)
            )
            equal[way].append(expected == found)
            if way == "greedy" and tokenizer is not None:
                for name, answer in (("pytorch", expected), ("exported", found)):
                    texts[name].append(tokenizer.decode(answer, skip_special_tokens=True).strip())
    tokens = {way: float(np.mean(same)) for way, same in equal.items()}
    if tokenizer is None or importlib.util.find_spec("rouge_score") is None:
        return tokens, None
    from ..metrics.texts import rouge_l

    return tokens, {
        name: float(np.mean([rouge_l(answer, row["target"]) for answer, row in zip(answers, rows, strict=True)]))
        for name, answers in texts.items()
    }


@torch.no_grad()
def compare_on_rows(exported, model, rows: Sequence[Mapping]) -> tuple[dict[str, float], float]:
    """Cross-entropy of the targets, nats a token, and the share of target tokens whose likeliest token is the same."""
    sums, same, count = {"pytorch": 0.0, "exported": 0.0}, 0, 0
    for row in rows:
        ids, labels = torch.tensor([row["inputs"]]), torch.tensor([row["labels"]])
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels),
        }
        logits = {"pytorch": model(**inputs).logits[0].double(), "exported": exported(**inputs).logits[0].double()}
        for name, of_one in logits.items():
            sums[name] += float(torch.nn.functional.cross_entropy(of_one, labels[0], reduction="sum"))
        same += int((logits["pytorch"].argmax(-1) == logits["exported"].argmax(-1)).sum())
        count += labels.shape[1]
    return {name: total / count for name, total in sums.items()}, same / count


@torch.no_grad()
def time_answer(model, rows: Sequence[Mapping]) -> dict[str, float]:
    """Seconds to the first token and for each further one: batch 1, longest prompt of the rows, median of rounds."""
    ids = torch.tensor([max((row["inputs"] for row in rows), key=len)])
    mask = torch.ones_like(ids)
    start = torch.tensor([[model.config.decoder_start_token_id]])
    first, following = [], []
    for _ in range(_ROUNDS + 1):
        begin = time.perf_counter()
        encoded = model.get_encoder()(input_ids=ids, attention_mask=mask)
        # A student that was trained with checkpointed gradients says use_cache=False in its config.
        outputs = model(attention_mask=mask, encoder_outputs=encoded, decoder_input_ids=start, use_cache=True)
        first.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        outputs = model(
            attention_mask=mask,
            encoder_outputs=encoded,
            decoder_input_ids=start,
            past_key_values=outputs[CACHE_FIELD],
            use_cache=True,
        )
        following.append(time.perf_counter() - begin)
    # The first round warms up.
    return {
        "first_token": statistics.median(first[1:]),
        "token": statistics.median(following[1:]),
        "prompt": ids.shape[1],
    }
