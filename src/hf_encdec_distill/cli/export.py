"""Export a student to ONNX, OpenVINO, Core ML, ONNX Runtime GenAI or llama.cpp, and prove that it answers as before.

With several targets, each has a folder of its own in OUT. An export that is out of bounds is kept as OUT.rejected, and
the command fails. parity.json in the folder has the comparison; docs/export.md explains it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..export.backends import Backend, backend_of, check_installed, targets
from ..progress import Display
from ._display import say_result, table, wrap
from ._inputs import add_data_arguments, check_at_least_one, load_splits, load_test_rows


if TYPE_CHECKING:
    from datasets import Dataset

SUMMARY = "export to ONNX, OpenVINO, Core ML, GenAI or llama.cpp"
EXAMPLE = "hf-encdec-distill export runs/quickstart/student --target onnx,openvino --variant int8 exported"

_MAX_SOURCE, _MAX_TARGET = 256, 32
_GUESS, _SHARE_OF_EXPORT = 90.0, 0.2  # seconds of a target before anything is known, and how much of them writes it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or Hub id of a student")
    parser.add_argument("output", metavar="OUT", help="new folder")
    *names, last = targets()
    parser.add_argument(
        "--target",
        required=True,
        metavar="NAME[,NAME]",
        help=f"any of {', '.join(names)} and {last}, separated by commas",
    )
    parser.add_argument(
        "--variant",
        default="fp32",
        metavar="NAME",
        help="how weights are stored: fp32, fp16, int8, int4, palette4 for coreml, or q4_k_m for gguf "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--shapes",
        default="dynamic",
        metavar="SHAPES",
        help="dynamic, or fixed:SRC,TGT in tokens, which NPUs need; for coreml also ranged:SRC,TGT and "
        "enumerated:SRC,...,TGT (default: %(default)s)",
    )
    parser.add_argument(
        "--stateless",
        action="store_true",
        help="make keys and values inputs and outputs of the decoder: for iOS 16 and 17, or several answers at once",
    )
    parser.add_argument(
        "--calibration-rows",
        type=int,
        metavar="N",
        help="for int4 to openvino: training rows whose activations say which weights matter (AWQ; default: none)",
    )
    parser.add_argument(
        "--kv-cache-precision",
        metavar="NAME",
        help="for openvino: f32, f16, bf16 or u8, written into the file and proven with; stateful decoders, dynamic "
        "shapes (default: f32 in the proof, the device's own elsewhere)",
    )
    add_data_arguments(parser)
    parser.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help=f"test rows to compare on (default: {Backend.rows}, or 6 for coreml)",
    )


def run(args: argparse.Namespace) -> None:
    from ..export.exporting import check_new
    from ..export.recipe import Shapes

    chosen = list(dict.fromkeys(part.strip() for part in args.target.split(",")))
    check_at_least_one(args, "rows", "calibration_rows")
    output = Path(args.output).resolve()  # "." has no name, and others are made of it
    folders = {target: output if len(chosen) == 1 else output / target for target in chosen}
    for folder in folders.values():
        check_new(folder)
        check_new(folder.with_name(f"{folder.name}.rejected"))
    shapes = Shapes.parse(args.shapes)
    model, processor = _load(args.model)
    for target in chosen:
        _check(target, model, processor, args, shapes)
    reports = {target: _export(target, folders[target], model, processor, args, shapes) for target in chosen}
    say_result(args, reports, _page(reports))
    failed = {target: report["failures"] for target, report in reports.items() if report["failures"]}
    if failed:
        sentences = "; ".join(f"{target}: {', '.join(failures)}" for target, failures in failed.items())
        names = ", ".join(f"{folders[target]}.rejected" for target in failed)
        raise ValueError(f"not equal to PyTorch within bounds: {sentences}; kept as {names}")


def _load(name: str) -> tuple[Any, Any]:
    """The student in fp32, and its tokenizer or, if it reads images, its processor.

    Raises:
        ValueError: it is a model of another type, or a file of it is a link that leads out of its folder.
    """
    import torch

    from ..files import check_own_files
    from ..models.families import STUDENTS
    from ..models.loading import find, load_config, load_processor, load_student, load_tokenizer, reads_images

    check_own_files(find(name))
    config = load_config(name)
    if config.model_type not in STUDENTS:
        raise ValueError(
            f"{name} is a {config.model_type}: only students of this package can be exported; hf-encdec-distill init "
            "makes one from a decoder-only model, and Optimum exports that as it is (optimum-cli export)"
        )
    load = load_processor if reads_images(config) else load_tokenizer
    return load_student(name, dtype=torch.float32), load(name)


def _check(target: str, model, processor, args: argparse.Namespace, shapes) -> None:
    """All that can be wrong with a target, before the first is exported."""
    from ..export.recipe import check_exportable, check_options, size_of_images

    options = {"calibration": args.calibration_rows, "kv_cache_precision": args.kv_cache_precision}
    options = {name: value for name, value in options.items() if value is not None}
    check_exportable(model, target, args.variant, shapes, size_of_images(model.config, processor))
    check_options(target, args.variant, options)
    backend_of(target).settle(model.config, args.variant, shapes, False if args.stateless else None, options)
    check_installed(target)


def _export(target: str, folder: Path, model, processor, args: argparse.Namespace, shapes) -> dict[str, Any]:
    """Write, prove, and only then give the folder its name."""
    import shutil

    from ..cards.loading import PARITY, note_exports
    from ..cards.model_card import license_of
    from ..export.exporting import export_model
    from ..export.parity import prove
    from ..files import filling, write_json

    rows = _rows(load_test_rows(args), args.rows or backend_of(target).rows, model, processor, shapes)
    calibration = None
    if args.calibration_rows is not None:
        pairs = load_splits(args.dataset, args.source_column, args.target_column, packages="stdlib")["train"]
        calibration = _rows(pairs, args.calibration_rows, model, processor, shapes)
    begun, share = time.monotonic(), _SHARE_OF_EXPORT

    def seconds_left() -> float:
        used = time.monotonic() - begun
        return max(_GUESS - used, 0.0) if share == _SHARE_OF_EXPORT else used / share - used

    display = Display(seconds_left, stages=2)
    with filling(folder) as unproven:
        with display.stage(f"export to {target}") as update:
            stateful = False if args.stateless else None
            license = license_of(args.model) or "unknown"
            export_model(
                model,
                processor,
                target,
                unproven,
                args.variant,
                shapes,
                stateful,
                license,
                calibration,
                args.kv_cache_precision,
            )
            update(1.0, str(folder))
        with display.stage(f"compare {target} with PyTorch") as show:

            def update(done: float, detail: str) -> None:
                nonlocal share
                share = _SHARE_OF_EXPORT + (1 - _SHARE_OF_EXPORT) * done
                show(done, detail)

            tokenizer = getattr(processor, "tokenizer", processor)
            report = prove(unproven, model, rows, tokenizer, _MAX_TARGET, update)
        write_json(unproven / PARITY, report)
        if report["failures"]:
            with filling(folder.with_name(f"{folder.name}.rejected")) as rejected:
                shutil.copytree(unproven, rejected, dirs_exist_ok=True)  # it may be on another disk
            shutil.rmtree(unproven)
    if not report["failures"] and folder.parent == Path(args.model).resolve():
        note_exports(folder.parent, model.config.model_type)
    return report


def _rows(pairs: Dataset, count: int, model, processor, shapes) -> list[dict]:
    """Some of the pairs, cut as a student of this task reads them, to no more than the graphs take. A student that
    reads images sees one in front of each text, of 4 x 4 random colours."""
    import numpy as np

    tokenizer = getattr(processor, "tokenizer", processor)
    sees = tokenizer is not processor
    most = _MAX_SOURCE + (processor.tokens_of_tile if sees else 0)
    max_source = min(most, max(shapes.prompts) if shapes.prompts else most)
    max_target = min(_MAX_TARGET, shapes.targets or _MAX_TARGET)
    pairs = pairs.shuffle(seed=0).select(range(min(count, len(pairs))))
    eos = model.generation_config.eos_token_id
    eos = eos[0] if isinstance(eos, list) else eos
    colours = np.random.default_rng(0)
    rows = []
    for pair in pairs:
        labels = tokenizer(pair["target"], add_special_tokens=False)["input_ids"][: max_target - 1]
        row = {"labels": [*labels, *([] if eos is None else [eos])], "target": pair["target"]}
        if sees:
            text = processor.image_token + pair["source"].replace(processor.image_token, "")
            image = colours.integers(0, 256, (4, 4, 3), np.uint8)
            read = processor(images=image, text=text, truncation=True, max_length=max_source)
            row |= {"inputs": read["input_ids"][0], "pixel_values": read["pixel_values"]}
        else:
            row["inputs"] = tokenizer(pair["source"], truncation=True, max_length=max_source)["input_ids"]
        rows.append(row)
    return rows


def _multiplies_in_float32(reports: Mapping[str, Mapping], flags: set[str]) -> bool:
    """Whether OpenVINO decompresses quantised weights instead of rounding activations, as it does on x86 without VNNI
    (`useDynamicQuantizationImpl` of its CPU plug-in)."""
    quantised = "openvino" in reports and reports["openvino"]["variant"] in ("int8", "int4")
    return quantised and "avx2" in flags and not flags & {"avx512_vnni", "avx_vnni"}


def _page(reports: dict[str, dict]) -> str:
    from ..devices import cpu_flags

    def both(report: dict, name: str) -> str:
        return f"{report[name]['exported']:.3f} / {report[name]['pytorch']:.3f}" if name in report else ""

    def times(report: dict, name: str) -> str:
        seconds = report["seconds"]
        return f"{1e3 * seconds['exported'][name]:.1f} / {1e3 * seconds['pytorch'][name]:.1f}"

    sees = all("image_features" in report for report in reports.values())
    lines = {
        "largest logit difference": lambda r: f"{r['logits']:.1e}",
        **({"largest feature difference": lambda r: f"{r['image_features']:.1e}"} if sees else {}),
        "greedy answers equal": lambda r: f"{r['tokens']['greedy']:.0%}",
        "beam answers equal": lambda r: f"{r['tokens']['beam']:.0%}",
        "same most likely token": lambda r: f"{r['agreement']:.1%}",
        "CE, nats/token *": lambda r: both(r, "ce"),
        "ROUGE-L, 0 to 1 *": lambda r: both(r, "rouge_l"),
        "first token, ms *": lambda r: times(r, "first_token"),
        "further token, ms *": lambda r: times(r, "token"),
        "size, MB *": lambda r: f"{r['megabytes']['exported']:.1f} / {r['megabytes']['pytorch_fp32']:.1f}",
        "within bounds": lambda r: "no" if r["failures"] else "yes",
    }
    header = ["", *(f"{target} {report['variant']}" for target, report in reports.items())]
    rows = [[title, *(of(report) for report in reports.values())] for title, of in lines.items()]
    note = "* exported / PyTorch in fp32. Logit differences are a share of the largest logit."
    if sees:
        note += " So are those of image features. Each text had a random image in front."
    if _multiplies_in_float32(reports, cpu_flags()):
        note += " This CPU has no VNNI: OpenVINO reads prompts no faster in 8 or 4 bits than in fp32."
    return f"{table(header, rows)}\n\n{wrap(note)}"
