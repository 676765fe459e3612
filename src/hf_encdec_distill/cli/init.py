"""Make an untrained student from a decoder-only model's own layers.

AutoModelForSeq2SeqLM loads the folder, and `distill` starts from it. With all layers kept, the student computes what
the teacher does. Each layer removed costs quality, and distillation recovers it.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args, get_type_hints

from ._display import say_result
from ._inputs import BUILT_IN, add_data_arguments, load_splits, prompt_template, teacher_path


if TYPE_CHECKING:
    from datasets import Dataset

    from ..models.rope_encdec import RopeEncDecForConditionalGeneration


SUMMARY = "make an untrained student from a decoder-only model"
EXAMPLE = "hf-encdec-distill init built-in --encoder-layers 11 --decoder-layers 4 --output student"

_CALIBRATION_ROWS = 32


@dataclasses.dataclass(frozen=True)
class Shape:
    """What of a teacher its student keeps."""

    encoder_layers: int | None = None
    decoder_layers: int | None = None
    cross_attention: Literal["merged", "separate"] = "merged"
    encoder_attention: Literal["causal", "bidirectional"] = "causal"
    layer_selection: Literal["influence", "greedy", "even", "first"] = "influence"


_HELP = {
    "encoder_layers": "encoder layers to keep (default: all)",
    "decoder_layers": "decoder layers to keep (default: all)",
    "cross_attention": "how the decoder reads the encoder: merged (the default) or separate",
    "encoder_attention": "what an encoder token attends to: causal (the default) or bidirectional",
    "layer_selection": "which layers to keep: influence (the default: those that change their input most), greedy, "
    "even or first",
}


def add_shape_arguments(parser: argparse._ActionsContainer, prefix: str = "") -> None:
    """An option for each field of `Shape`; what is not said is not in the namespace."""
    hints = get_type_hints(Shape)
    for name, text in _HELP.items():
        choices = get_args(hints[name]) if get_args(hints[name])[0] is not int else None
        parser.add_argument(
            f"--{prefix}{name.replace('_', '-')}",
            f"--{prefix}{name}",
            dest=f"{prefix}{name}",
            type=str if choices else int,
            choices=choices,
            default=argparse.SUPPRESS,
            metavar=name.split("_")[-1].upper() if choices else "N",
            help=text,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", help=f"causal language model: folder, Hub id, or {BUILT_IN!r}")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new folder for the student")
    add_shape_arguments(parser)
    parser.add_argument(
        "--prompt-template",
        metavar="TEXT",
        help="the teacher's prompt, with {source} in it (default: its chat template)",
    )
    parser.add_argument(
        "--prompt-date",
        metavar="YYYY-MM-DD",
        help="the date for a chat template that contains one (default: today)",
    )
    add_data_arguments(parser)


def run(args: argparse.Namespace) -> None:
    output = new_folder(args.output)
    path = teacher_path(args.teacher)
    rows = load_splits(args.dataset, args.source_column, args.target_column, packages="stdlib")["train"]
    said = {field.name for field in dataclasses.fields(Shape)} & set(vars(args))
    shape = Shape(**{name: getattr(args, name) for name in said})
    template = prompt_template(args.prompt_template, args.dataset)
    student = make_student(path, shape, rows, template, args.prompt_date)
    student.save_pretrained(output)
    content = {
        "output": str(output),
        "encoder_layers": student.config.encoder_num_hidden_layers,
        "decoder_layers": student.config.decoder_num_hidden_layers,
        "parameters": student.num_parameters(),
    }
    layers = f"{content['encoder_layers']} + {content['decoder_layers']} layers"
    say_result(args, content, f"{output}: {layers}, {content['parameters'] / 1e6:.1f} M parameters")


def make_student(
    teacher: str, shape: Shape, rows: Dataset, template: str | None, prompt_date: str | None
) -> RopeEncDecForConditionalGeneration:
    """The student that has `shape` of the teacher in a folder or on the Hub, in float32.

    Args:
        rows: with the columns `source` and `target`; some of them, always the same, say which layers matter.
        template: the prompt's; `None` leaves it to the teacher's chat template.
        prompt_date: the day for a chat template that names it; `None` is today.
    """
    import torch

    from ..models.loading import load_teacher, load_tokenizer
    from ..models.rope_encdec import RopeEncDecForConditionalGeneration
    from ..models.whole_weights import whole_on_each_process

    rows = rows.shuffle(seed=0).select(range(min(_CALIBRATION_ROWS, len(rows))))
    with whole_on_each_process():
        model = load_teacher(teacher, dtype=torch.float32)
    return RopeEncDecForConditionalGeneration.from_decoder_only(
        model,
        tokenizer=load_tokenizer(teacher),
        encoder_num_hidden_layers=shape.encoder_layers,
        decoder_num_hidden_layers=shape.decoder_layers,
        cross_attention=shape.cross_attention,
        encoder_attention=shape.encoder_attention,
        layer_selection=shape.layer_selection,
        prompt_template=template,
        prompt_date=prompt_date,
        calibration=list(zip(rows["source"], rows["target"], strict=True)),
    )


def new_folder(path: str) -> Path:
    """Raises ValueError if something is there already."""
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: choose another folder with --output")
    return folder
