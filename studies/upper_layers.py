"""Which layers of a teacher to train in a quickstart's minutes, and whether to keep the states below them.

    hf-encdec-distill quickstart --output runs/seed-0
    python studies/upper_layers.py runs/seed-0

The teacher of a finished run is tuned again, for as long and on the same rows in the same order. Either all layers
learn, or only the upper ones, which takes no backward pass through the lower ones; or the states below the upper ones
are computed once, in the same time, for rows that are then read several times. All are scored on the same held-out
rows. A study that is interrupted goes on. Writes upper_layers.json and upper_layers.md into docs/studies/upper_layers.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tasks import difference_by_row, rouge_l_of_rows, table_line, taken_before

from hf_encdec_distill.bench import machine_description
from hf_encdec_distill.cli.quickstart import recipe
from hf_encdec_distill.cli.quickstart.pipeline import Pipeline, _quiet
from hf_encdec_distill.cli.quickstart.state import open_run
from hf_encdec_distill.cli.quickstart.timed_training import TimeShare, train, training_order
from hf_encdec_distill.cli.quickstart.tuning import trainer_in_order
from hf_encdec_distill.devices import autocast, device, working_dtype
from hf_encdec_distill.evaluation.scoring import completion_batch, score
from hf_encdec_distill.files import write_json


@dataclass(frozen=True)
class Arm:
    """Args:
    upper: layers that learn, all if `None`.
    passes: over the rows whose states are kept. With 0 none are, and each row is read once.
    learning_rate: the largest.
    """

    upper: int | None = None
    passes: int = 0
    learning_rate: float = recipe.TEACHER_LEARNING_RATE


ARMS = {
    "all": Arm(),
    "upper 10": Arm(10),
    "upper 10, rate 5e-4": Arm(10, learning_rate=5e-4),
    "upper 10, kept states, 1 pass": Arm(10, 1),
    "upper 10, kept states, 3 passes": Arm(10, 3),
}
REFERENCE = "all"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished quickstarts")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seconds", type=float, default=120.0, help="for each training")
    parser.add_argument("--rows", type=int, default=200, help="held-out rows")
    parser.add_argument("--output", type=Path, default=Path("docs/studies/upper_layers"))
    args = parser.parse_args()
    arms = list(dict.fromkeys([REFERENCE, *args.arms]))
    file = args.output / "upper_layers.json"
    args.output.mkdir(parents=True, exist_ok=True)
    taken = taken_before(file, (f"{folder.name} {name}" for folder in args.runs for name in arms))
    for folder in args.runs:
        pipeline = Pipeline(open_run(folder, {}, True))
        for name in arms:
            found = taken[f"{folder.name} {name}"]
            if not found:
                found.append(measure(pipeline, ARMS[name], args.seconds, args.rows))
                print(folder.name, name, found[0]["steps"], round(found[0]["ce"], 3), flush=True)
                write_json(file, taken)
    (args.output / "upper_layers.md").write_text(table(taken, args.seconds), encoding="utf-8")


def measure(pipeline: Pipeline, arm: Arm, seconds: float, held_out: int) -> dict:
    """Steps, CE and ROUGE-L of each held-out row (0 to 100) of a teacher that was tuned so."""
    model = pipeline.load_teacher(pipeline.teacher_path, torch.float32)
    begun = time.monotonic()
    steps, rows = tune(model, pipeline, arm, seconds)
    found = {"steps": steps, "rows": rows, "seconds": time.monotonic() - begun}
    model.eval().to(working_dtype())
    # Of all runs the same ones.
    test = sorted(pipeline.rows["test"], key=lambda row: (row["source"], row["target"]))
    test = [test[index] for index in np.random.default_rng(0).permutation(len(test))[:held_out]]
    found["ce"] = float(score({"": model}, test)[""]["ce"].sum() / sum(len(row["labels"]) for row in test))
    texts = pipeline.answers(model, test, _quiet)
    return found | {"rouge_l": rouge_l_of_rows(texts, test)}


def tune(model, pipeline: Pipeline, arm: Arm, seconds: float) -> tuple[int, int]:
    """Returns the number of steps that were made, and of the rows that were read."""
    rows, batch, seed = pipeline.rows["train"], recipe.BATCH_SIZE, pipeline.settings.seed
    most = len(rows) // batch
    share = TimeShare(seconds, most, arm.learning_rate, _quiet)
    order = training_order([len(row["prompt"]) for row in rows], batch, most, seed)
    rows = [rows[index] for index in order]
    layers = model.model.layers
    lower = 0 if arm.upper is None else len(layers) - arm.upper
    model.get_input_embeddings().requires_grad_(False)
    layers[:lower].requires_grad_(False)
    collate = completion_batch
    if arm.passes:
        states = keep_states(model, lower, rows, arm, share)
        rows = [row | {"states": state} for row, state in zip(rows[: len(states)], states, strict=True)]
        order = training_order([len(row["prompt"]) for row in rows], batch, most, seed)
        size, rows = len(rows), [rows[index] for index in order]
        model.model.layers = layers[lower:]
        collate = _on_states
    with tempfile.TemporaryDirectory(dir=pipeline.work) as folder:
        trainer = trainer_in_order(model, rows, collate, Path(folder), most, batch, seed)
        steps = train(trainer, share)["steps"]
    model.model.layers = layers
    return steps, size if arm.passes else steps * batch


def keep_states(model, lower: int, rows: Sequence[dict], arm: Arm, share: TimeShare) -> list[torch.Tensor]:
    """What the upper layers read of as many rows as leave time for the passes, each `(T, H)` in float16.

    A row takes a forward of the lower layers, and in each pass as much as three of the upper ones.
    """
    body = model.model
    every, norm = body.layers, body.norm
    seconds = share.seconds / (1 + 3 * arm.passes * (len(every) - lower) / lower)
    body.layers, body.norm = every[:lower], torch.nn.Identity()
    model.eval()
    states: list[torch.Tensor] = []
    for first in range(0, len(rows), recipe.BATCH_SIZE):
        if states and share.used > seconds:
            break
        some = rows[first : first + recipe.BATCH_SIZE]
        batch = completion_batch(some)
        inputs = {name: batch[name].to(device()) for name in ("input_ids", "attention_mask", "position_ids")}
        with torch.inference_mode(), autocast():
            found = body(**inputs, use_cache=False).last_hidden_state.to("cpu", torch.float16)
        states += [state[-len(row["prompt"] + row["labels"]) :] for state, row in zip(found, some, strict=True)]
    body.layers, body.norm = every, norm
    model.train()
    return states


def _on_states(rows: Sequence[dict]) -> dict:
    """As `completion_batch`, with states for tokens."""
    batch = completion_batch(rows)
    batch["inputs_embeds"] = torch.zeros(*batch.pop("input_ids").shape, rows[0]["states"].shape[-1])
    for states, row in zip(batch["inputs_embeds"], rows, strict=True):
        states[-len(row["states"]) :] = row["states"]
    return batch


def table(taken: Mapping[str, Sequence[Mapping]], seconds: float) -> str:
    names = list(dict.fromkeys(name.partition(" ")[2] for name in taken))

    def of(name: str) -> list[Mapping]:
        return [found[0] for key, found in taken.items() if key.partition(" ")[2] == name]

    def scores(name: str) -> np.ndarray:
        """Of each row, the mean over the runs."""
        return np.mean([found["rouge_l"] for found in of(name)], axis=0)

    def listed(name: str, what: str, digits: int = 0) -> str:
        return ", ".join(f"{found[what]:,.{digits}f}" for found in of(name))

    header = ["layers that learn", "steps", "rows", "CE", "ROUGE-L", f"minus {REFERENCE}"]
    lines = [
        "# Which layers of the teacher learn\n",
        f"Runs of the quickstart: {len(of(REFERENCE))}. {seconds:g} seconds for each training. Held-out rows: "
        f"{len(scores(REFERENCE))}. {machine_description()['cpu']}. One number for each run; ROUGE-L is the mean over "
        "the runs, differences row by row, with 95 % intervals over the rows.\n",
        table_line(header),
        table_line(["---"] * len(header)),
    ]
    for name in names:
        cells = [name, listed(name, "steps"), listed(name, "rows"), listed(name, "ce", 3)]
        difference = "" if name == REFERENCE else " ".join(difference_by_row(scores(name), scores(REFERENCE)))
        cells += [f"{scores(name).mean():.1f}", difference]
        lines.append(table_line(cells))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
