"""Quality against time: students of several quickstarts, in llama.cpp with 8-bit weights.

    hf-encdec-distill quickstart --encoder-layers 20 --decoder-layers 10 --output runs/20-10
    hf-encdec-distill quickstart --output runs/5-6
    python studies/speed.py runs/20-10 runs/5-6

Quality is measured on the same held-out rows for all; runs that differ in their seed alone are one student. Time is
that of one run of each and of their teacher as it came, in the interleaved rounds of `bench`. Writes speed.json,
speed.md and a plot for each request into docs/studies/speed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from datasets import DatasetDict
from tasks import difference_by_row, picture, rouge_l_of_rows, table_line

from hf_encdec_distill.bench import best_cpu_dtype, machine_description, plot_front
from hf_encdec_distill.bench.contenders import Model, contenders
from hf_encdec_distill.bench.race import Request, race
from hf_encdec_distill.bench.results import TIMES
from hf_encdec_distill.data import fetch_builtin_teacher
from hf_encdec_distill.evaluation import encode_rows, generate
from hf_encdec_distill.files import write_json
from hf_encdec_distill.metrics import pareto_front
from hf_encdec_distill.models.loading import load_config, load_student, load_teacher, load_tokenizer


TEACHER = "teacher"
REQUESTS = (Request(128, 32, 1), Request(512, 64, 1))
REFERENCE = (20, 10)  # layers of the student that the others are held against
HELD_OUT = 256  # rows


@dataclass(frozen=True)
class Run:
    """A quickstart: what it was asked for, and how good its student is.

    Attributes:
        scores, teacher_scores: ROUGE-L of each held-out row, 0 to 100.
        kl, agreement: from the teacher, on the fewer rows of the quickstart.
    """

    folder: str
    encoder_layers: int
    decoder_layers: int
    vocabulary: int
    minutes: float
    seed: int
    scores: list[float]
    teacher_scores: list[float]
    kl: float
    agreement: float

    @classmethod
    def of(cls, folder: Path) -> Run:
        """Of a quickstart's folder."""
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        settings = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))["settings"]
        student = metrics["models"]["student_kd"]
        return cls(
            folder.name,
            settings["encoder_layers"],
            settings["decoder_layers"],
            load_config(folder / "student").vocab_size,
            settings["minutes"],
            settings["seed"],
            _scores(folder, load_student(folder / "student")),
            _scores(folder, load_teacher(folder / "work" / "teacher", dtype=best_cpu_dtype())),
            student["kl"]["value"],
            100 * student["teacher_agreement"]["value"],
        )

    @property
    def rouge_l(self) -> float:
        return statistics.mean(self.scores)

    @property
    def of_teacher(self) -> float:
        return self.rouge_l / statistics.mean(self.teacher_scores)

    @property
    def label(self) -> str:
        return f"{self.encoder_layers} + {self.decoder_layers}, {self.vocabulary:,} tokens, {self.minutes:g} minutes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of quickstarts")
    parser.add_argument("--output", type=Path, default=Path("docs/studies/speed"))
    parser.add_argument("--converted", type=Path, default=Path("runs/studies/speed"), help="for GGUF files")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    by_label: dict[str, list[Run]] = {}
    for run in map(Run.of, args.runs):
        by_label.setdefault(run.label, []).append(run)
    folders = {folder.name: folder for folder in args.runs}
    if len(folders) < len(args.runs):
        raise ValueError("two of the folders have one name, by which the report calls them: rename one")
    models = {label: _model(label, folders[runs[0].folder] / "student") for label, runs in by_label.items()}
    models[TEACHER] = _model(TEACHER, Path(fetch_builtin_teacher()))
    chosen = [one for model in models.values() for one in contenders(model) if _is_llama_cpp(one)]
    threads = machine_description()["usable_cores"] or 1
    report = race(models, chosen, REQUESTS, _prompts, args.converted, threads, args.rounds, 30.0, _stage)
    args.output.mkdir(parents=True, exist_ok=True)
    quality = {label: [asdict(run) for run in runs] for label, runs in by_label.items()}
    write_json(args.output / "speed.json", {"quality": quality, "bench": report})
    report_on(by_label, report, args.output)


def report_on(by_label: Mapping[str, Sequence[Run]], report: Mapping, output: Path) -> None:
    """Table and plots in the folder `output`."""
    parts = [tables(by_label, report)]
    for request in REQUESTS:
        stem = f"speed-{request.source}-{request.target}"
        title = f"{request.source} tokens in, {request.target} out, llama.cpp, 8 bits"
        plot_front(
            points(by_label, report, request),
            output / f"{stem}.svg",
            across="request / teacher's request",
            up="ROUGE-L",
            title=title,
        )
        parts.append(picture(stem, title))
    (output / "speed.md").write_text("\n".join(parts), encoding="utf-8")


def _scores(folder: Path, model) -> list[float]:
    """Of a run's model, on held-out rows of the built-in task, as the quickstart scores answers."""
    recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))["recipe"]
    task = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["task"]
    tokenizer = load_tokenizer(folder / "work" / "teacher")
    limits = recipe["max_prompt_tokens"], recipe["max_target_tokens"]
    held_out = DatasetDict.load_from_disk(str(folder / "work" / "data"))["test"].shuffle(seed=0)
    rows = encode_rows(held_out, tokenizer, task["prompt_template"], *limits)[:HELD_OUT]
    texts = [
        text.partition('"""')[0].strip().partition("\n")[0] for text in generate(model, tokenizer, rows, limits[1])
    ]
    return rouge_l_of_rows(texts, rows)


def _model(name: str, folder: Path) -> Model:
    return Model(name, folder, load_config(folder))


def _is_llama_cpp(contender) -> bool:
    return contender.precision == "int8" and contender.backend.startswith(("gguf", "llama.cpp"))


def _prompts(model: Model, request: Request, number: int) -> list[list[int]]:
    """Python source in the model's tokens; a student's ends in the token from which its decoder starts."""
    source = Path(argparse.__file__).read_text(encoding="utf-8") + Path(textwrap.__file__).read_text(encoding="utf-8")
    ids = load_tokenizer(model.folder)(source, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    begin = number * request.source % (len(ids) - request.source)
    prompt = ids[begin : begin + request.source]
    return [[*prompt[:-1], model.config.decoder_start_token_id] if model.is_student else prompt]


@contextlib.contextmanager
def _stage(title: str) -> Iterator:
    print(title, flush=True)
    yield lambda fraction, detail="": None


# --- tables and plots ---


def points(by_label: Mapping[str, Sequence[Run]], report: Mapping, request: Request) -> dict[str, tuple]:
    """For each student its request in its teacher's, and mean, least and largest ROUGE-L of its seeds."""
    found = {}
    for label, runs in by_label.items():
        values = [run.rouge_l for run in runs]
        ratio = _ratio(report, label, request, "request_ms")
        found[label] = ratio, (statistics.mean(values), min(values), max(values))
    return found


def _row(report: Mapping, model: str, request: Request) -> Mapping:
    """The fastest of a model's."""
    rows = [row for row in report["rows"] if row["model"] == model and row["source"] == request.source]
    return min(rows, key=lambda row: row["request_ms"]["value"])


def _ratio(report: Mapping, model: str, request: Request, timing: str) -> float:
    """Of the teacher's time, within each round; the median."""
    rows = [_row(report, name, request)["measured"] for name in (model, TEACHER)]
    return statistics.median(own[timing] / teacher[timing] for own, teacher in zip(*rows, strict=True))


def tables(by_label: Mapping[str, Sequence[Run]], report: Mapping) -> str:
    machine, count = report["machine"], len(next(iter(by_label.values()))[0].scores)
    lines = [
        f"# Quality against time\n\nllama.cpp, 8 bits, {machine['threads']} threads, {machine['cpu']}; "
        f"{report['spread']}. Milliseconds, and in brackets shares of the teacher's time, of its fastest way in "
        f"llama.cpp. ROUGE-L on {count} held-out rows: mean over the seeds, in brackets the least and the largest.\n",
    ]
    header = ["student", "M parameters", "seeds", "ROUGE-L", "of the teacher's", "KL", "agreement"]
    header += [f"{request.source}/{request.target}: first token, step, request" for request in REQUESTS]
    lines += [table_line(header), table_line(["---"] * len(header))]
    fronts = [pareto_front(_means(by_label, report, request)) for request in REQUESTS]
    for label, runs in by_label.items():
        values = [run.rouge_l for run in runs]
        spread = f" [{min(values):.1f}, {max(values):.1f}]" if len(runs) > 1 else ""
        parameters = _row(report, label, REQUESTS[0])["parameters"]
        cells = [label, f"{parameters / 1e6:.1f}", str(len(runs)), f"{statistics.mean(values):.1f}{spread}"]
        cells.append(f"{100 * statistics.mean(run.of_teacher for run in runs):.0f} %")
        cells += [f"{statistics.mean(run.kl for run in runs):.2f}"]
        cells += [f"{statistics.mean(run.agreement for run in runs):.1f} %"]
        for request, front in zip(REQUESTS, fronts, strict=True):
            text = _times(report, label, request)
            cells.append(f"**{text}**" if label in front else text)
        lines.append(table_line(cells))
    cells = [f"{TEACHER}, {_row(report, TEACHER, REQUESTS[0])['parameters'] / 1e6:.1f} M parameters", *[""] * 6]
    lines.append(table_line([*cells, *(_times(report, TEACHER, request) for request in REQUESTS)]))
    lines.append("\nBold: on the front, no other student answers as soon and scores higher.\n")
    lines += _against_reference(by_label)
    return "\n".join(lines)


def _means(by_label, report, request) -> dict[str, tuple[float, float]]:
    return {label: (time, value) for label, (time, (value, *_)) in points(by_label, report, request).items()}


def _times(report: Mapping, model: str, request: Request) -> str:
    row = _row(report, model, request)
    return ", ".join(f"{row[timing]['value']:.1f} ({_ratio(report, model, request, timing):.2f})" for timing in TIMES)


def _against_reference(by_label: Mapping[str, Sequence[Run]]) -> list[str]:
    """Points of ROUGE-L from the student of `REFERENCE` layers to each other, paired by row, means over the seeds."""
    lines = []
    for reference, runs in by_label.items():
        if (runs[0].encoder_layers, runs[0].decoder_layers) != REFERENCE:
            continue
        for label, others in by_label.items():
            if label != reference:
                of, minus = (_mean_by_row(group) for group in (others, runs))
                difference, spread = difference_by_row(of, minus)
                lines.append(f"- {label}, minus {reference}: {difference} points {spread}")
    return [*lines, ""] if lines else []


def _mean_by_row(runs: Sequence[Run]) -> np.ndarray:
    return np.mean([run.scores for run in runs], axis=0)


if __name__ == "__main__":
    main()
