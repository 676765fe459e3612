"""The two tasks of the studies, on real text that needs no Hub, each with a teacher that has learnt it.

- `docstrings`: a Python function of the machine's own packages -> the first sentence of its docstring.
- `debian`: the long description of a Debian package -> its one-line synopsis, from Debian's own package index.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from hf_encdec_distill.bench import best_cpu_dtype
from hf_encdec_distill.data import (
    PROMPT_TEMPLATE,
    fetch_builtin_teacher,
    load_builtin_teacher,
    load_pairs,
    load_python_docstrings,
)
from hf_encdec_distill.evaluation import encode_rows
from hf_encdec_distill.metrics import rouge_l
from hf_encdec_distill.metrics.significance import interval, mean


MAX_SOURCE, MAX_TARGET = 96, 24  # tokens; longer rows are left out, so that nothing is cut
TRAIN_ROWS, TEST_ROWS = 2400, 200
TEACHER_STEPS, TEACHER_BATCH, TEACHER_LEARNING_RATE = 150, 16, 2e-4
# Factor and digits of a measure in a table.
MEASURES = {"ce": (1, 3), "kl": (1, 3), "teacher_agreement": (100, 1), "rouge_l": (100, 1), "distinct": (100, 0)}
PROMPT_TEMPLATES = {"docstrings": PROMPT_TEMPLATE, "debian": "{source}\n\nIn one line:\n"}


@dataclass(frozen=True)
class Task:
    """Rows `source` and `target` in `train`, `validation` and `test`, and the folder of the teacher."""

    name: str
    rows: DatasetDict
    prompt_template: str
    teacher: Path


def rounded(value: float, measure: str) -> str:
    factor, digits = MEASURES[measure]
    return f"{factor * value:.{digits}f}"


def table_line(cells: Iterable[str]) -> str:
    """Of Markdown."""
    return f"| {' | '.join(cells)} |"


def picture(stem: str, title: str) -> str:
    """For Markdown, a plot that `plot_front` wrote: in the version for the reader's light or dark page."""
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{stem}-dark.svg">'
    return f'<picture>{dark}<img alt="{title}" src="{stem}.svg"></picture>\n'


def rouge_l_of_rows(texts: Iterable[str], rows: Iterable[Mapping]) -> list[float]:
    """Of each answer, 0 to 100."""
    return [100 * rouge_l(text, row["target"]) for text, row in zip(texts, rows, strict=True)]


def difference_by_row(scores: Sequence[float], reference: Sequence[float]) -> tuple[str, str]:
    """Of the means, and its 95 % interval over the rows."""
    ones = np.ones(len(scores))
    found = interval(mean(scores, ones), mean(reference, ones))
    return f"{found['value']:+.1f}", f"[{found['low']:+.1f}, {found['high']:+.1f}]"


def taken_before(file: Path, names: Iterable[str]) -> dict[str, list[dict]]:
    """What an interrupted study has measured of each name, none where there is no file yet."""
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {name: before.get(name, []) for name in names}


def load_task(name: str, work: Path, train_rows: int = TRAIN_ROWS) -> Task:
    """Rows in an order of their own (seed 0), and a teacher tuned on training rows that the students do not get.

    Args:
        name: `docstrings` or `debian`.
        work: folder for rows and teacher; what is there already is taken as it is.
        train_rows: of the students.
    """
    template = PROMPT_TEMPLATES[name]
    folder = work / name
    tokenizer = AutoTokenizer.from_pretrained(fetch_builtin_teacher())
    if not (folder / "rows").exists():
        pairs = load_python_docstrings("all") if name == "docstrings" else _debian_pairs(folder)

        def fits(row: dict) -> bool:
            source, target = (len(tokenizer(text)["input_ids"]) for text in (row["source"], row["target"]))
            return source <= MAX_SOURCE - 8 and 3 <= target < MAX_TARGET

        short = {split: rows.filter(fits).shuffle(seed=0) for split, rows in pairs.items()}
        rest = short["train"].select(range(min(train_rows, len(short["train"])), len(short["train"])))
        if not len(rest):
            raise ValueError(
                f"{name}: {len(short['train'])} short training rows, and the students take {train_rows}, which leaves "
                "none for the teacher: install more packages here (docstrings), or take a fuller index (debian)"
            )
        for_teacher = rest.select(range(min(TEACHER_STEPS * TEACHER_BATCH, len(rest))))
        limits = {"train": train_rows, "validation": 100, "test": TEST_ROWS}
        rows = {split: short[split].select(range(min(n, len(short[split])))) for split, n in limits.items()}
        DatasetDict(rows | {"teacher": for_teacher}).save_to_disk(folder / "rows")
    rows = load_from_disk(str(folder / "rows"))
    if not (folder / "teacher").exists():
        _tune_teacher(folder, rows, template)
    return Task(name, rows, template, folder / "teacher")


@functools.cache
def remembering_teacher(folder: Path, dtype: torch.dtype, device: torch.device):
    """The teacher, which is asked about the same batches after every run and answers them once."""
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    forward, answers = teacher.forward, {}

    def remembered(input_ids: torch.Tensor, **options):
        key = tuple(input_ids.flatten().tolist())
        if key not in answers:
            answers[key] = forward(input_ids=input_ids, **options)
        return answers[key]

    teacher.forward = remembered
    return teacher


def _tune_teacher(folder: Path, rows: DatasetDict, template: str) -> None:
    """All layers but the embedding, on rows of its own, with the loss on the targets alone.

    The teacher of the published numbers had these steps, batches and peak rate, and a rate that fell from step to step
    by the quickstart's schedule.
    """
    model, tokenizer = load_builtin_teacher(torch.float32)
    model.get_input_embeddings().requires_grad_(False)
    train, held_out = (
        [
            {"input_ids": row["prompt"] + row["labels"], "labels": [-100] * len(row["prompt"]) + row["labels"]}
            for row in encode_rows(rows[split], tokenizer, template, MAX_SOURCE, MAX_TARGET)
        ]
        for split in ("teacher", "validation")
    )
    args = TrainingArguments(
        output_dir=str(folder / "training"),
        per_device_train_batch_size=TEACHER_BATCH,
        num_train_epochs=1,
        learning_rate=TEACHER_LEARNING_RATE,
        warmup_steps=20,
        bf16=best_cpu_dtype() is torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        seed=0,
    )
    trainer = Trainer(
        model, args, DataCollatorForSeq2Seq(tokenizer), Dataset.from_list(train), Dataset.from_list(held_out)
    )
    trainer.train()
    print(f"teacher: held-out loss {trainer.evaluate()['eval_loss']:.3f} after {trainer.state.global_step} steps")
    partial = folder / "teacher.partial"
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.replace(partial, folder / "teacher")


def _debian_pairs(folder: Path) -> DatasetDict:
    """Written by the example for summarisation."""
    program = Path(__file__).parents[1] / "examples" / "tasks" / "summarization.py"
    subprocess.run([sys.executable, program, folder / "pairs"], check=True)
    return load_pairs(folder / "pairs")
