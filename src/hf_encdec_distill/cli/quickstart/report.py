"""The quickstart's result as text: the table at the end and the page of samples."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...cards.model_card import fenced
from ...metrics.measures import METRICS, model_label, model_order
from .._display import table, wrap
from .recipe import GO_ON_MINUTES


def continuation(folder: Path | str) -> str:
    """The command that continues a finished run."""
    return shlex.join(
        ["hf-encdec-distill", "quickstart", "--resume", "--minutes", f"{GO_ON_MINUTES:g}", "--output", str(folder)]
    )


def samples_page(samples: list[dict], language: str) -> str:
    """Markdown: each source with its reference and what each model wrote."""
    parts = ["# Samples, held out\n"]
    for number, sample in enumerate(samples, 1):
        lines = [f"## {number}\n", fenced(sample["source"], language) + "\n", "| | |", "|---|---|"]
        lines += [
            f"| {model_label(name, {}) if name != 'reference' else name} | {_in_a_row(text)} |"
            for name, text in sample.items()
            if name != "source"
        ]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _in_a_row(text: str) -> str:
    """As a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def summary(metrics: Mapping, folder: Path) -> str:
    """The table that a person reads at the end, and the lines that load the student."""
    models = metrics["models"]
    shown = [name for name in METRICS if any(name in entry for entry in models.values())]
    header = ["", *(METRICS[name][0].split(",")[0] for name in shown)]
    body = [
        [model_label(key, models), *(_cell(models[key].get(name), *METRICS[name][1:3]) for name in shown)]
        for key in model_order(models)
    ]
    against_twin = ""
    for difference in metrics["differences"]:  # a short run has none
        rows = [[METRICS[name][0], *_spread(difference.get(name), *METRICS[name][1:3])] for name in shown]
        against_twin = f"\n{table(['distilled minus cross-entropy alone', '', ''], rows)}\n"
    ratio, cost = metrics["latency"]["ratio"], metrics["cost"]
    speed = [
        [
            side,
            f"{cost[side]['parameters']['total'] / 1e6:.1f} M",
            f"{metrics['latency'][side]['first_token_ms']['value']:.1f}",
            f"{metrics['latency'][side]['step_ms']['value']:.1f}",
            f"{metrics['latency'][side]['tokens_per_second']['value']:.1f}",
        ]
        for side in ("teacher", "student")
    ]
    speed.append(
        [
            "student / teacher",
            f"{cost['ratio']['parameters']:.2f}",
            f"{ratio['first_token']['value']:.2f}",
            f"{ratio['step']['value']:.2f}",
            f"{1 / ratio['step']['value']:.2f}",
        ]
    )
    recipe, latency = metrics["recipe"], metrics["latency"]
    request = f"{latency['prompt_length']:.0f} tokens in, {latency['new_tokens']} out, {latency['dtype']}"
    counted = next(iter(models.values()))["n"]
    return f"""
{table(header, body)}
{against_twin}
{counted} held-out rows, seed {metrics["seeds"][0]}.
{wrap(f"In brackets: {metrics['spread']}.")}
Steps: teacher {recipe["teacher_steps"]}, student {recipe["steps"]}, batch size {recipe["batch_size"]}.
{_of_teacher(models)}{_said(metrics.get("verdict"), folder)}

{table(["", "parameters", "first token, ms", "further token, ms", "tokens/s"], speed)}

{wrap(f"Batch 1, {request}, PyTorch, both with key/value caches.")}

{wrap(f"Model card, metrics, plots and samples are in {folder}. Load the student with")}
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
    path = {str(folder / "student")!r}
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    model = AutoModelForSeq2SeqLM.from_pretrained(path, trust_remote_code=True)
"""


def _of_teacher(models: Mapping) -> str:
    measure = "rouge_l" if "rouge_l" in models["teacher"] else "chrf"
    student, teacher = (models[name][measure]["value"] for name in ("student_kd", "teacher"))
    name = METRICS[measure][0].split(",")[0]
    return f"The student reaches {100 * student / teacher:.0f} % of the tuned teacher's {name}." if teacher else ""


def _said(verdict: Mapping | None, folder: Path) -> str:
    """The sentences of a verdict, and the command that goes on from here."""
    if not verdict or not verdict["sentences"]:
        return ""
    sentences = "\n".join(wrap(sentence) for sentence in verdict["sentences"])
    return f"\n\n{sentences}\nIts training goes on from here with\n    {continuation(folder)}"


def _cell(estimate: Any, factor: float, decimals: int) -> str:
    if estimate is None:
        return "-"
    value = estimate["value"] if isinstance(estimate, Mapping) else estimate
    return f"{factor * value:.{decimals}f}"


def _spread(estimate: Any, factor: float, decimals: int) -> tuple[str, str]:
    if not isinstance(estimate, Mapping):
        return "-", ""
    value, low, high = (f"{factor * estimate[key]:+.{decimals}f}" for key in ("value", "low", "high"))
    return value, f"[{low}, {high}]"
