"""Make an untrained student from a decoder-only model's own layers.

AutoModelForSeq2SeqLM loads the folder, and `distill` starts from it. With all layers kept, the student computes what
the teacher does. Each layer removed costs quality, and distillation recovers it. With --decoder-only the student is a
smaller decoder-only model, which AutoModelForCausalLM loads.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from ..files import filling, is_used
from ._display import say_result
from ._inputs import BUILT_IN, add_data_arguments, load_splits, prompt_template, teacher_path


if TYPE_CHECKING:
    from datasets import Dataset

    from ..models.rope_encdec.budget import Budget


SUMMARY = "make an untrained student from a decoder-only model"
EXAMPLE = "hf-encdec-distill init built-in --encoder-layers 5 --decoder-layers 6 --output student"

_ROWS_TO_CHOOSE_LAYERS = 32
_SIDES = ("encoder", "decoder")
_LAYERS = ("encoder_layers", "decoder_layers", "decoder_only")
_OF_EITHER_KIND = ("decoder_only", "layer_selection", "heal_rows")


@dataclasses.dataclass(frozen=True)
class Shape:
    """What of a teacher its student keeps."""

    decoder_only: int | None = None
    encoder_layers: int | None = None
    decoder_layers: int | None = None
    decoder_intermediate_size: int | None = None
    cross_attention: Literal["merged", "separate"] = "merged"
    cross_attention_sharing: int = 1
    encoder_attention: Literal["causal", "bidirectional"] = "causal"
    encoder_pooling: int = 1
    encoder_pooling_layer: int | None = None
    encoder_sliding_window: int | None = None
    layer_selection: Literal["influence", "induction", "least_squares", "greedy", "even", "first"] = "influence"
    heal_rows: int = 200
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for fields that do not go together, or too few rows."""
        if self.heal_rows < 0:
            raise ValueError(f"heal_rows={self.heal_rows} does not work: a number of rows, or 0 for none, is needed.")
        for field in dataclasses.fields(Shape):
            name, value = field.name, getattr(self, field.name)
            if self.decoder_only is not None and name not in _OF_EITHER_KIND and value != field.default:
                raise ValueError(
                    f"decoder_only={self.decoder_only} makes a student without an encoder, and {name}={value} is for "
                    "one that has it: leave one of the two out"
                )
        if self.encoder_pooling_layer is not None and self.encoder_pooling == 1:
            raise ValueError(
                f"encoder_pooling_layer={self.encoder_pooling_layer} says where positions are pooled, and "
                "encoder_pooling=1 pools none: give 2 or more for encoder_pooling, or leave the layer out"
            )


_HELP = {
    "decoder_only": "make a decoder-only student with this many layers",
    "encoder_layers": "encoder layers to keep (default: all)",
    "decoder_layers": "decoder layers to keep (default: all)",
    "decoder_intermediate_size": "neurons to keep in each MLP of the decoder (default: all)",
    "cross_attention": "how the decoder reads the encoder: merged (the default) or separate",
    "cross_attention_sharing": "neighbouring decoder layers that read the same keys and values of the prompt "
    f"(default: {Shape.cross_attention_sharing}, each its own)",
    "encoder_attention": "what an encoder token attends to: causal (the default) or bidirectional",
    "encoder_pooling": "neighbouring prompt tokens that become one position half way up the encoder (default: "
    f"{Shape.encoder_pooling}, no pooling)",
    "encoder_pooling_layer": "the first encoder layer that sees the pooled positions (default: the one half way up)",
    "encoder_sliding_window": "tokens that two of three encoder layers attend to: of each three the first attends to "
    "all (default: all do)",
    "layer_selection": "which layers to keep: influence (the default: the first two, the last and those that change "
    "their input most), induction (likewise, after those that copy from the prompt), least_squares (those that a "
    "linear fit joins best), greedy, even or first",
    "heal_rows": "training rows on which the layers that are kept are fitted to the teacher (default: "
    f"{Shape.heal_rows}; 0: no fit)",
    "vocabulary": "most tokens of the student's vocabulary: those most frequent in the training rows. It is then "
    "distilled with --vocab-policy id_map (default: the teacher's)",
}


def add_shape_arguments(parser: argparse._ActionsContainer, prefix: str = "") -> None:
    """An option for each field of `Shape`; what is not said is not in the namespace."""
    hints = get_type_hints(Shape)
    for name, text in _HELP.items():
        choices = get_args(hints[name]) if get_origin(hints[name]) is Literal else None
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
    budget = parser.add_argument_group("budget", "the best student that is fast enough, instead of numbers of layers")
    budget.add_argument("--prompt-tokens", type=int, metavar="N", help="length of a prompt")
    budget.add_argument("--answer-tokens", type=int, metavar="N", help="length of an answer")
    budget.add_argument(
        "--speedup", type=float, metavar="X", help="how many times faster than the teacher it answers such a prompt"
    )
    add_data_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from ..models.either_version import save_teacher

    budget = _budget(args)
    said = {field.name for field in dataclasses.fields(Shape)} & set(vars(args))
    shape = Shape(**{name: getattr(args, name) for name in said})
    output = new_folder(args.output)
    path = teacher_path(args.teacher)
    rows = load_splits(args.dataset, args.source_column, args.target_column, packages="stdlib")["train"]
    template = prompt_template(args.prompt_template, args.dataset)
    student = make_student(path, shape, rows, template, args.prompt_date, budget)
    counts: dict[str, int]
    with filling(output) as partial:
        if shape.decoder_only is None:
            student.save_pretrained(partial)
            counts = {f"{side}_layers": getattr(student.config, f"{side}_num_hidden_layers") for side in _SIDES}
        else:
            save_teacher(student, student.tokenizer, partial)
            counts = {"layers": student.config.num_hidden_layers}
    content = {
        "output": str(output),
        **counts,
        "parameters": student.num_parameters(),
        "healing": student.healing and student.healing.to_dict(),
    }
    layers = " + ".join(map(str, counts.values()))
    lines = [f"{output}: {layers} layers, {content['parameters'] / 1e6:.1f} M parameters"]
    if student.healing is not None and student.healing.taken:
        lines.append(str(student.healing))
    say_result(args, content, "\n".join(lines))


def _budget(args: argparse.Namespace) -> Budget | None:
    from ..models.rope_encdec.budget import Budget

    values = {name: getattr(args, name) for name in ("prompt_tokens", "answer_tokens", "speedup")}
    missing = [f"--{name.replace('_', '-')}" for name, value in values.items() if value is None]
    if len(missing) == len(values):
        return None
    if missing:
        raise ValueError(f"a budget is incomplete without {' and '.join(missing)}: give all three of its options")
    numbers = ("encoder_layers", "decoder_layers", "decoder_only", "encoder_pooling_layer")
    given = [f"--{name.replace('_', '-')}" for name in numbers if hasattr(args, name)]
    if given:
        raise ValueError(f"--speedup decides how many layers are kept: leave out {' and '.join(given)}, or the budget")
    return Budget(**values)


def make_student(
    teacher: str,
    shape: Shape,
    rows: Dataset,
    template: str | None,
    prompt_date: str | None,
    budget: Budget | None = None,
) -> Any:
    """The student that has `shape` of the teacher in a folder or on the Hub, in float32; an adapter is merged.

    Args:
        rows: with the columns `source` and `target`; some of them, always the same, say which layers matter and how
            those that are kept make up for the others.
        template: the prompt's; `None` leaves it to the teacher's chat template.
        prompt_date: the day for a chat template that names it; `None` is today.
        budget: decides how many layers are kept, where `shape` does not say.
    """
    import torch

    from ..models.decoder_only import prune_decoder_only
    from ..models.loading import load_merged_teacher, load_tokenizer
    from ..models.rope_encdec import RopeEncDecForConditionalGeneration
    from ..models.vocabulary import trim_to_rows
    from ..models.whole_weights import whole_on_each_process

    teacher_depth(teacher, **{name: getattr(shape, name) for name in _LAYERS})
    tokenizer = load_tokenizer(teacher)
    trimmed = {}
    if shape.vocabulary is not None:
        trimmed["trimmed_tokenizer"] = trim_to_rows(tokenizer, rows, shape.vocabulary, template, prompt_date)
    rows = rows.shuffle(seed=0).select(range(min(shape.heal_rows or _ROWS_TO_CHOOSE_LAYERS, len(rows))))
    with whole_on_each_process():
        model = load_merged_teacher(teacher, dtype=torch.float32)
    shared: dict[str, Any] = {
        "tokenizer": tokenizer,
        "layer_selection": shape.layer_selection,
        "heal": "least_squares" if shape.heal_rows else None,
        "prompt_template": template,
        "prompt_date": prompt_date,
        "calibration": list(zip(rows["source"], rows["target"], strict=True)),
    }
    if shape.decoder_only is not None:
        return prune_decoder_only(model, num_hidden_layers=shape.decoder_only, **shared)
    return RopeEncDecForConditionalGeneration.from_decoder_only(
        model,
        encoder_num_hidden_layers=shape.encoder_layers,
        decoder_num_hidden_layers=shape.decoder_layers,
        decoder_intermediate_size=shape.decoder_intermediate_size,
        cross_attention=shape.cross_attention,
        cross_attention_sharing=shape.cross_attention_sharing,
        encoder_attention=shape.encoder_attention,
        encoder_pooling=shape.encoder_pooling,
        encoder_pooling_layer=shape.encoder_pooling_layer,
        encoder_sliding_window=shape.encoder_sliding_window,
        budget=budget,
        **trimmed,
        **shared,
    )


def teacher_depth(teacher: str, **layers: int | None) -> int:
    """The layers of the teacher in a folder or on the Hub, of which a student has at most as many.

    Args:
        layers: of the student, by the name of the option; `None` is as many as there are.

    Raises:
        OSError: there is no such folder, and no such model on the Hub.
        ValueError: no student can be made of it, or not with so many or few layers.
    """
    from ..models.loading import base_of, check_decoder_only, load_config
    from ..models.rope_encdec.teacher_layers import check_family

    config = load_config(base_of(teacher))
    check_decoder_only(teacher, config)
    check_family(config)
    depth = config.get_text_config(decoder=True).num_hidden_layers
    for name, count in layers.items():
        if count is not None and not 1 <= count <= depth:
            raise ValueError(f"--{name.replace('_', '-')} {count}: the teacher has {depth} layers, give 1 to {depth}")
    return depth


def new_folder(path: str) -> Path:
    """Raises ValueError if something is there already."""
    folder = Path(path)
    if is_used(folder):
        raise ValueError(f"{folder} is not empty: choose another folder with --output")
    return folder
