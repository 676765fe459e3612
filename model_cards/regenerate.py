"""Writes the cards in this folder and in docs/runs from the records of runs and studies in docs/.

python model_cards/regenerate.py
"""

import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_encdec_distill.cards import write_model_card
from hf_encdec_distill.data.builtin_teacher import FACTS
from hf_encdec_distill.data.python_docstrings import ROWS_LICENSE
from hf_encdec_distill.metrics import estimate


FOLDER = Path(__file__).resolve().parent
DOCS = FOLDER.parent / "docs"
RUN = Path("runs") / "quickstart-120-minutes"
sys.path.append(str(FOLDER.parent / "studies"))

from quality import ARMS, CACHES, LEARNING_RATE, MEASURES  # noqa: E402
from tasks import MAX_SOURCE, MAX_TARGET, PROMPT_TEMPLATES, TEACHER_BATCH, TEACHER_STEPS, TRAIN_ROWS  # noqa: E402


TASKS = {
    "docstrings": {
        "name": "Python docstrings",
        "description": "Reads a short Python function without its docstring and writes the first sentence of the "
        "docstring.",
        "license": ROWS_LICENSE,
    },
    "debian": {
        "name": "Debian package synopses",
        "description": "Reads the long description of a Debian package and writes its one-line synopsis.",
        "license": "that of the package that each description is of",
    },
}


def regenerate(folder: Path = FOLDER, docs: Path = DOCS) -> list[Path]:
    """Returns the paths written."""
    run, name = quickstart(), "runs/quickstart/student"
    figures = {caption: f"../docs/{RUN}/{file}" for caption, file in run["figures"].items()}
    cards = [
        write_model_card(docs / RUN / "model_card.md", run, name),
        write_model_card(folder / "quickstart-120-minutes.md", {**run, "figures": figures}, name),
    ]
    for file in sorted((DOCS / "studies" / "quality").glob("*.json")):
        metrics = study(json.loads(file.read_text(encoding="utf-8")))
        cards.append(write_model_card(folder / f"study-{file.stem}.md", metrics, f"study-{file.stem}"))
    return cards


def quickstart() -> dict[str, Any]:
    metrics = json.loads((DOCS / RUN / "metrics.json").read_text(encoding="utf-8"))
    return {**metrics, "data": {"license": ROWS_LICENSE, **metrics["data"]}}


def study(results: Mapping[str, Any]) -> dict[str, Any]:
    """The student of the reference arm, over its seeds; beside it the arms that have as many."""
    setting, arms = results["setting"], results["arms"]
    task, rows = TASKS[setting["task"]], setting["test_rows"]
    seeds = sorted(arms["base"], key=int)

    def of_rows(name: str, value: dict[str, float]) -> dict[str, Any]:
        return {**value, "rows": setting["generated_rows"]} if name in ("rouge_l", "distinct") else value

    models = {"teacher": {"n": rows} | {name: of_rows(name, {"value": x}) for name, x in setting["teacher"].items()}}
    for arm, runs in arms.items():
        if set(seeds) <= set(runs):
            key = {"base": "student_kd", "ce": "student_ce"}.get(arm, arm)
            measured = {name: of_rows(name, estimate([runs[seed][name] for seed in seeds])) for name in MEASURES}
            models[key] = {"n": rows, "label": f"student, {ARMS[arm].label}", **measured}
    differences = {
        name: of_rows(name, estimate([arms["base"][seed][name] - arms["ce"][seed][name] for seed in seeds]))
        for name in MEASURES
    }
    command = f"python studies/quality.py --task {setting['task']} --arms base"
    return {
        "note": f"> The study kept no weights; `{command}` trains this student again.",
        "title": f"SmolLM2-135M-Instruct as an encoder-decoder, {setting['steps']} steps on {task['name']}",
        "task": {
            "name": task["name"],
            "description": task["description"],
            "pipeline_tag": "summarization",
            "language": "en",
            "prompt_template": PROMPT_TEMPLATES[setting["task"]],
        },
        "teacher": {**FACTS, "adaptation": f"all layers but the embedding, {TEACHER_STEPS} steps of {TEACHER_BATCH}"},
        "student": {
            "encoder_layers": setting["layers"][0],
            "decoder_layers": setting["layers"][1],
            "cross_attention": "merged",
            "encoder_attention": "causal",
        },
        "data": {"name": setting["task"], "license": task["license"], "train_rows": TRAIN_ROWS, "test_rows": rows},
        "recipe": {
            "divergence": "forward_kl",
            "distill_weight": 0.9,
            "teacher_signal": f"a cache of the {CACHES['top_k']['k']} likeliest tokens",
            "steps": setting["steps"],
            "batch_size": setting["batch_size"],
            "learning_rate": LEARNING_RATE,
            "schedule": f"warm-up over {setting['steps'] // 8} steps, then linear to zero",
            "max_prompt_tokens": MAX_SOURCE,
            "max_target_tokens": MAX_TARGET,
        },
        "stages": [
            {
                "name": f"one student, mean of {len(seeds)} seeds",
                "steps": setting["steps"],
                "seconds": statistics.mean(arms["base"][seed]["seconds"] for seed in seeds),
            }
        ],
        "seeds": [int(seed) for seed in seeds],
        "spread": f"minimum and maximum of {len(seeds)} seeds; ROUGE-L and distinct outputs are of the first "
        f"{setting['generated_rows']} rows",
        "models": models,
        "differences": [{"of": "student_kd", "minus": "student_ce", **differences}],
        "limits": [f"{setting['steps']} steps are enough to compare recipes, not to make a good student."],
    }


if __name__ == "__main__":
    for path in regenerate():
        print(path.relative_to(FOLDER.parent))
