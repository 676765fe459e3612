"""How much of the loss the teacher's predictions should be, in the minutes of a quickstart.

    hf-encdec-distill quickstart --output runs/seed-0
    hf-encdec-distill quickstart --seed 1 --output runs/seed-1
    python studies/loss_weight.py runs/seed-0 runs/seed-1

The students of finished runs are trained again: from the start that their run made, on the rows that it recorded, in
the same order and for as many steps. Only the weight of the teacher differs; the rest of the loss is cross-entropy on
the labels. All are scored on all held-out rows. A study that is interrupted goes on. Writes loss_weight.json and
loss_weight.md into docs/studies/loss_weight.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tasks import difference_by_row, rouge_l_of_rows, table_line, taken_before

from hf_encdec_distill.bench import machine_description
from hf_encdec_distill.cli.quickstart import recipe
from hf_encdec_distill.cli.quickstart.pipeline import Pipeline, _quiet
from hf_encdec_distill.cli.quickstart.state import open_run
from hf_encdec_distill.cli.quickstart.timed_training import TimeShare
from hf_encdec_distill.devices import working_dtype
from hf_encdec_distill.evaluation import score
from hf_encdec_distill.files import write_json


WEIGHTS = (0.5, 0.2, 0.0)
REFERENCE = recipe.DISTILL_WEIGHT  # that the others are held against
TEACHER = "teacher"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of quickstarts of less than 30 minutes")
    parser.add_argument("--weights", nargs="+", type=float, default=WEIGHTS, help=f"beside {REFERENCE:g}")
    parser.add_argument("--output", type=Path, default=Path("docs/studies/loss_weight"))
    args = parser.parse_args()
    weights = list(dict.fromkeys([REFERENCE, *args.weights]))
    pipelines = [_open(folder) for folder in args.runs]
    file = args.output / "loss_weight.json"
    kinds = [TEACHER, *map(str, weights)]
    taken = taken_before(file, (f"{folder.name} {kind}" for kind in kinds for folder in args.runs))
    args.output.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        for pipeline in pipelines:
            found = taken[f"{pipeline.folder.name} {kind}"]
            if not found:
                found.append(measure(pipeline, kind))
                print(pipeline.folder.name, kind, np.mean(found[0]["rouge_l"]).round(1), flush=True)
                write_json(file, taken)
    (args.output / "loss_weight.md").write_text(table(taken, weights), encoding="utf-8")


def _open(folder: Path) -> Pipeline:
    pipeline = Pipeline(open_run(folder, {}, True))
    if not pipeline.state.is_frozen or "report" not in pipeline.state.results:
        raise ValueError(f"{folder} is no finished quickstart of less than 30 minutes: give others")
    return pipeline


def measure(pipeline: Pipeline, kind: str) -> dict:
    """CE, KL and agreement with the teacher, and ROUGE-L of each held-out row (0 to 100), of a student that is trained
    with this weight; of the teacher, ROUGE-L alone."""
    teacher = pipeline.load_teacher(pipeline.work / "teacher", working_dtype())
    rows = sorted(pipeline.rows["test"], key=lambda row: (row["source"], row["target"]))  # of all runs alike
    model, found = teacher, {}
    if kind != TEACHER:
        with tempfile.TemporaryDirectory(dir=pipeline.work) as name:
            folder, results = Path(name), pipeline.state.results
            steps, recorded = results["distill"]["steps"], results["start"]["recorded"]
            share = TimeShare(float("inf"), steps, recipe.STUDENT_LEARNING_RATE, _quiet)
            pipeline._train_student(share, float(kind), recorded, folder / "training", folder / "student")
            model = pipeline.load_student(folder / "student", working_dtype())
        tokens = sum(len(row["labels"]) for row in rows)
        sums = score({kind: model}, rows, teacher)[kind]
        found = {measure: float(values.sum() / tokens) for measure, values in sums.items()} | {"steps": steps}
    texts = pipeline.answers(model, rows, _quiet)
    return found | {"rouge_l": rouge_l_of_rows(texts, rows)}


def table(taken: Mapping[str, Sequence[Mapping]], weights: Sequence[float]) -> str:
    def of(kind) -> list[Mapping]:
        return [found[0] for name, found in taken.items() if name.rpartition(" ")[2] == str(kind)]

    def scores(kind) -> np.ndarray:
        """Of each row, the mean over the runs."""
        return np.mean([found["rouge_l"] for found in of(kind)], axis=0)

    teachers = [np.mean(found["rouge_l"]) for found in of(TEACHER)]
    steps = ", ".join(str(found["steps"]) for found in of(weights[0]))
    lines = [
        "# Weight of the teacher in the loss\n",
        f"Runs of the quickstart: {len(teachers)}. Held-out rows: {len(scores(TEACHER))}. "
        f"{machine_description()['cpu']}. Steps of the runs: {steps}. ROUGE-L of their teachers: "
        f"{', '.join(f'{value:.1f}' for value in teachers)}. Means over the runs; differences row by row, with "
        "95 % intervals over the rows.\n",
    ]
    header = ["weight", "CE", "KL", "agreement", "ROUGE-L", "of the teachers'", f"minus {REFERENCE}"]
    lines += [table_line(header), table_line(["---"] * len(header))]
    for weight in weights:
        found = of(weight)
        means = {name: np.mean([one[name] for one in found]) for name in ("ce", "kl", "teacher_agreement")}
        own = [np.mean(one["rouge_l"]) for one in found]
        shares = [100 * value / teacher for value, teacher in zip(own, teachers, strict=True)]
        cells = [
            f"{weight:g}",
            f"{means['ce']:.2f}",
            f"{means['kl']:.2f}",
            f"{100 * means['teacher_agreement']:.1f} %",
        ]
        cells += [f"{np.mean(own):.1f}", ", ".join(f"{share:.0f}" for share in shares) + " %"]
        cells.append("" if weight == REFERENCE else " ".join(difference_by_row(scores(weight), scores(REFERENCE))))
        lines.append(table_line(cells))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
