"""Time a student against what people would pick instead: its teacher, a decoder-only model of its size, and others.

Each model runs in the best that each backend offers, in a process of its own, in interleaved rounds. The report says
how far each is from what this machine could do, and names what is not installed. docs/bench.md explains it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..progress import Display
from ._display import say_result, table, wrap
from ._inputs import BUILT_IN, check_at_least_one, check_is_there, public_name, teacher_path


if TYPE_CHECKING:
    from ..bench.contenders import Contender, Model
    from ..bench.race import Request


SUMMARY = "time a student against other models and runtimes"
EXAMPLE = "hf-encdec-distill bench runs/quickstart/student --teacher built-in"

# Decoder-only models with as many parameters as the student: with the teacher's vocabulary, and with its own.
_OF_SIZE, _OF_VOCABULARY = "same-size decoder", "same-size decoder, student's vocabulary"
_REPORT = "bench.json"
_STAGES = 4
# Of a model on the Hub; weights in a second format where there are none in the first, as `from_pretrained` has it.
_FILES, _PICKLED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"], ["*.bin"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("student", nargs="?", help="folder or Hub id of a student; not needed with --compare")
    parser.add_argument(
        "--teacher",
        metavar="MODEL",
        help=f"its decoder-only teacher, or {BUILT_IN!r} (default: a model of its layers with random weights, which "
        "are as fast, and with the student's vocabulary, which may be smaller)",
    )
    parser.add_argument(
        "--decoder-only",
        metavar="MODEL",
        action="append",
        default=[],
        help="another decoder-only model to compare with; may be given several times",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--source", default="128,512", metavar="TOKENS,...", help="prompts (default: %(default)s)")
    parser.add_argument(
        "--target", default="32,64", metavar="TOKENS,...", help="answers, one for each --source (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", default="1", metavar="ROWS,...", help="one for all or one for each --source (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="rounds, at most (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="time limit (default: %(default)g)")
    parser.add_argument("--threads", type=int, metavar="N", help="of each contender (default: all cores)")
    parser.add_argument("--backend", metavar="NAME,...", help="only these backends (default: all)")
    parser.add_argument("--precision", metavar="NAME,...", help="only these precisions (default: all)")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two bench.json, row by row: B / A")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="BASELINE",
        help="fail if student / decoder-only is larger than in this bench.json by more than its spread",
    )


def run(args: argparse.Namespace) -> None:
    from ..bench.results import check_against, check_rounds, compare, read_report

    for file in filter(None, (*(args.compare or ()), args.against)):
        check_is_there(file, f"the {_REPORT} of an earlier bench")
    if args.compare:
        if args.student is not None or args.against is not None:
            raise ValueError("--compare reads two reports and times nothing: leave the student and --against out")
        rows = compare(*map(read_report, args.compare))
        say_result(args, {"rows": rows}, _comparison(rows))
        return
    if args.student is None:
        raise ValueError("name a student to time, or two reports with --compare A.json B.json")
    check_at_least_one(args, "rounds", "threads")
    if not 0 < args.minutes < float("inf"):
        raise ValueError(f"--minutes {args.minutes:g}: give more than 0")
    requests = _requests(args)
    baseline = None
    if args.against:
        baseline = read_report(args.against)
        check_rounds(str(args.against), baseline["rounds"])
        check_rounds("this bench", args.rounds)
        if args.against.resolve() == (args.output / _REPORT).resolve():
            raise ValueError(f"--against {args.against}: this bench would write over it; give another --output")
    report = _measure(args, requests)
    say_result(args, report, _page(report))  # first: a disk that is full shall not take the numbers along
    _write(args.output, report)
    if baseline is not None:
        check_against(report, baseline, args.against)


def _measure(args: argparse.Namespace, requests: Sequence[Request]) -> dict[str, Any]:
    import time

    from ..bench import machine_description
    from ..bench.contenders import contenders
    from ..bench.race import race

    models, random, left_out = _models(args)
    chosen = _chosen([contender for model in models.values() for contender in contenders(model)], args)
    for name in random.keys() & {contender.model for contender in chosen}:
        _write_random_model(models[name], models["student"])
    threads = args.threads or machine_description()["usable_cores"] or 1
    end = time.monotonic() + 60 * args.minutes
    display = Display(lambda: end - time.monotonic(), _STAGES, seconds_late=lambda: time.monotonic() - end)
    prompts = _prompts(models["student"])
    report = race(
        models, chosen, requests, prompts, args.output / "converted", threads, args.rounds, args.minutes, display.stage
    )
    report["left_out"] = left_out + report["left_out"]
    return report


def _write(folder: Path, report: dict[str, Any]) -> None:
    from ..files import write_json

    write_json(folder / _REPORT, report)
    try:
        from ..bench.plots import plot_bench
    except ImportError as error:  # the numbers are there without it
        print(f"no plots: {error}", file=sys.stderr)
    else:
        plot_bench(report, folder / "bench.png")


def _requests(args: argparse.Namespace) -> list[Request]:
    """
    Raises:
        ValueError: a length is no whole number or too small, or there are not as many of one as of the other.
    """
    from ..bench.race import Request

    def numbers(name: str, least: int) -> list[int]:
        words = getattr(args, name).split(",")
        if not all(word.strip().isdecimal() and int(word) >= least for word in words):
            raise ValueError(
                f"--{name} {getattr(args, name)}: give whole numbers of at least {least}, such as {least}"
            )
        return [int(word) for word in words]

    sources, targets, batches = numbers("source", 2), numbers("target", 2), numbers("batch", 1)
    if len(batches) == 1:
        batches *= len(sources)
    if not len(sources) == len(targets) == len(batches):
        raise ValueError(
            f"--source {args.source}, --target {args.target} and --batch {args.batch}: give as many of each, since "
            "the first belongs to the first, and so on"
        )
    return list(dict.fromkeys(map(Request, sources, targets, batches)))


def _chosen(found: Sequence[Contender], args: argparse.Namespace) -> list[Contender]:
    """
    Raises:
        ValueError: a backend or precision that no model has.
    """
    from ..bench.contenders import PRECISIONS

    kept = list(found)
    for name in ("backend", "precision"):
        if getattr(args, name) is None:
            continue
        words = {word.strip() for word in getattr(args, name).split(",")}

        def names(contender: Contender, name: str = name) -> set[str]:
            """A backend's own, and without its settings: `llama.cpp` is `llama.cpp -fa off` too."""
            value = getattr(contender, name)
            return {value, value.split(" -")[0]}

        known = dict.fromkeys(getattr(contender, name) for contender in found)
        if unknown := words.difference(*map(names, found)):
            raise ValueError(f"--{name} {', '.join(sorted(unknown))}: choose from {', '.join(known)}")
        kept = [contender for contender in kept if names(contender) & words]
    if not kept:
        raise ValueError(f"no model has --backend {args.backend} in --precision {args.precision}: name others")
    # Should time run short, it is the rarest precision and the teacher that are missing.
    first = ("student", _OF_SIZE, _OF_VOCABULARY)

    def order(contender: Contender) -> tuple[int, int]:
        whose = first.index(contender.model) if contender.model in first else len(first)
        return list(PRECISIONS).index(contender.precision), whose

    return sorted(kept, key=order)


def _models(args: argparse.Namespace) -> tuple[dict[str, Model], dict[str, Any], list[dict[str, str]]]:
    """The student, its teacher, decoder-only models of its size, and those of `--decoder-only`; which of them have
    random weights, and are not written yet; what the report says of one that there cannot be.

    Raises:
        ValueError: the student is none of this package, or has no teacher to be compared with, or the cost of a model
            cannot be counted.
    """
    import copy
    import hashlib

    from ..bench.contenders import Model
    from ..models.cost import decoder_only_config, model_cost
    from ..models.decoder_only import config_of_size
    from ..models.loading import check_decoder_only, load_config, reads_images

    config = load_config(args.student)
    if reads_images(config):
        raise ValueError(f"{args.student} reads images, and the benchmark gives it texts alone: name a text student")
    if config.model_type != "rope_encdec":
        raise ValueError(
            f"{args.student} is a {config.model_type}, expected a student of this package: hf-encdec-distill init "
            "makes one; give other models with --decoder-only"
        )
    student = Model("student", _folder(args.student), config)
    models, random, left_out = {"student": student}, {}, []

    def add(name: str, folder: Path, mend: str = "name another --teacher") -> None:
        of_folder = load_config(folder)
        check_decoder_only(folder, of_folder)
        try:
            model_cost(of_folder, 2)  # each row has one
        except ValueError as error:
            raise ValueError(f"{folder}: {error}; {mend}") from error
        models[name] = Model(name, folder, of_folder)

    def add_random(name: str, of_random: Any) -> None:
        digest = hashlib.sha256(of_random.to_json_string().encode()).hexdigest()[:12]
        folder = args.output / "models" / f"{of_random.model_type}-{of_random.num_hidden_layers}-{digest}"
        models[name] = random[name] = Model(name, folder, of_random)

    if args.teacher is not None:
        add("teacher", _folder(teacher_path(args.teacher)))
        teacher_config = models["teacher"].config
    else:
        teacher_config = decoder_only_config(config)
        if teacher_config is None:
            raise ValueError(f"{args.student} does not say which model it came from: name one with --teacher")
        add_random("teacher", teacher_config)
    for name in (_OF_SIZE, _OF_VOCABULARY):
        like = copy.deepcopy(teacher_config)
        if name == _OF_VOCABULARY:
            if config.vocab_size == teacher_config.vocab_size:
                continue
            for field in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"):
                setattr(like, field, getattr(config, field))
        same_size = config_of_size(like, model_cost(config, 2).parameters["total"])
        if same_size is None:
            why = "it would have no layer, since its vocabulary alone has more parameters than the student"
            left_out.append({"model": name, "backend": "any", "precision": "any", "why": why})
        else:
            add_random(name, same_size)
    for path in args.decoder_only:
        name = public_name(path)
        if name in models:
            raise ValueError(f"--decoder-only {path}: there is a {name!r} in this bench; rename the folder")
        add(name, _folder(teacher_path(path)), "leave it out of --decoder-only")
    return models, random, left_out


def _folder(name: str) -> Path:
    """A model's own folder, or where its files are once the Hub has been asked for all of them: converters and other
    processes take folders."""
    from huggingface_hub import snapshot_download

    from ..models.loading import find

    found = find(name)  # whose errors say what is wrong with the name
    if Path(name).is_dir():
        return found
    folder = Path(snapshot_download(name, allow_patterns=_FILES))
    if any(folder.glob("*.safetensors")):
        return folder
    return Path(snapshot_download(name, allow_patterns=[*_FILES, *_PICKLED]))


def _write_random_model(model: Model, student: Model) -> None:
    """A decoder-only model of random weights into its folder, unless it is there."""
    import contextlib
    import shutil

    import torch
    from transformers import AutoModelForCausalLM

    from ..models.loading import load_tokenizer
    from ..models.prompts import in_a_class_of_both_versions

    folder = model.folder
    if folder.exists():
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    partial = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(partial, ignore_errors=True)
    weights.save_pretrained(partial)
    with contextlib.suppress(FileNotFoundError):  # converters ask for a tokenizer, and say so where there is none
        in_a_class_of_both_versions(load_tokenizer(student.folder)).save_pretrained(partial)
    partial.rename(folder)


def _prompts(student: Model) -> Callable[[Model, Request, int], list[list[int]]]:
    """Prompts of Python source, each model's in its own vocabulary; those of `student`'s vocabulary end in the token
    with which a merged student starts, as its prompts do. Random tokens where a model has no tokenizer."""
    import textwrap

    import torch

    from ..models.loading import load_tokenizer

    tokens: dict[str, list[int]] = {}

    def text(model: Model) -> list[int]:
        if model.name not in tokens:
            try:
                tokenizer = load_tokenizer(model.folder)
                source = Path(argparse.__file__).read_text(encoding="utf-8") + Path(textwrap.__file__).read_text()
                ids = tokenizer(source, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
            except OSError:
                ids = torch.randint(
                    model.config.vocab_size, (2**14,), generator=torch.Generator().manual_seed(0)
                ).tolist()
            tokens[model.name] = ids
        return tokens[model.name]

    def prompts(model: Model, request: Request, number: int) -> list[list[int]]:
        ids = text(model)
        rows = []
        for row in range(request.batch):
            begin = (number * request.batch + row) * request.source % len(ids)
            whole = ids[begin:] + ids * (1 + request.source // len(ids))
            rows.append(whole[: request.source])
        if model.config.vocab_size == student.config.vocab_size:
            rows = [[*row[:-1], student.config.decoder_start_token_id] for row in rows]
        return rows

    return prompts


def _page(report: dict[str, Any]) -> str:
    header = ["", "first token, ms", "step, ms", "request, ms", "requests/s", "x floor", "memory, MB", "disk, MB"]
    blocks = []
    rates, machine = report["rates"]["cpu"], report["machine"]
    products = ", ".join(f"{name} {rates[name] / 1e9:.0f}" for name in rates if name != "read")
    blocks.append(
        wrap(
            f"{machine['cpu']}, threads of each: {machine['threads']}, load {machine['load']}. It reads "
            f"{rates['read'] / 1e9:.1f} GB/s and multiplies, in GFLOP/s: {products}. {report['spread'].capitalize()}."
        )
    )
    requests: dict[str, list[dict]] = {}
    for row in report["rows"]:
        requests.setdefault(_request(row), []).append(row)
    for request, rows in requests.items():
        rows = sorted(rows, key=lambda row: row["request_ms"]["value"])
        cells = [
            [
                f"{row['model']}, {row['backend']} {row['precision']}",
                f"{row['first_token_ms']['value']:.1f}",
                f"{row['step_ms']['value']:.2f}",
                f"{row['request_ms']['value']:.1f} ±{_half(row['request_ms']):.1f}",
                f"{row['requests_per_second']:.2f}",
                f"{row['over_floor']['request_ms']:.1f}",
                f"{row['memory_mb']:.0f}",
                f"{row['disk_mb']:.0f}",
            ]
            for row in rows
        ]
        blocks.append(f"{request}\n\n{table(header, cells)}")
    for entry in report["headlines"]:
        student, other, ratio = entry["student"], entry["decoder_only"], entry["ratio"]
        blocks.append(
            wrap(
                f"{_request(entry)}: the student ({student['backend']} {student['precision']}) takes "
                f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}) of the time of the fastest "
                f"decoder-only model whose weights take no more bytes each ({other['model']}, {other['backend']} "
                f"{other['precision']})."
            )
        )
    if report["left_out"]:
        blocks.append("Left out:\n" + "\n".join(wrap(line, 2) for line in _left_out(report["left_out"])))
    return "\n\n".join(blocks)


def _left_out(entries: Sequence[dict]) -> list[str]:
    """A line a backend and reason, with all that it holds for."""
    whom: dict[tuple, list[str]] = {}
    for entry in entries:
        request = f" ({_request(entry)})" if "source" in entry else ""
        whom.setdefault((entry["backend"], entry["why"]), []).append(f"{entry['model']} {entry['precision']}{request}")
    return [f"- {backend}: {why} ({', '.join(names)})" for (backend, why), names in whom.items()]


def _request(row: dict) -> str:
    from ..bench.race import Request

    return str(Request(row["source"], row["target"], row["batch"]))


def _half(spread: dict[str, float]) -> float:
    return (spread["high"] - spread["low"]) / 2


def _comparison(rows: Sequence[dict]) -> str:
    from ..bench.results import TIMES

    header = ["B / A", "in", "out", "batch", "first token", "step", "request"]
    cells = [
        [
            f"{row['model']}, {row['backend']} {row['precision']}",
            *(str(row[name]) for name in ("source", "target", "batch")),
            *(f"{row['ratio'][name]:.2f}" for name in TIMES),
        ]
        for row in rows
    ]
    return table(header, cells)
