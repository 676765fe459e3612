"""Make an untrained student out of a decoder-only model's own layers.

The folder loads with AutoModelForSeq2SeqLM and is what `distill` starts from. With all layers kept the student
computes what the teacher does; every layer taken out costs some of that, and distillation heals it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ._inputs import BUILT_IN, add_data_arguments, load_splits, prompt_template, teacher_path


SUMMARY = "make an untrained student out of a decoder-only model"
EXAMPLE = "hf-encdec-distill init built-in --encoder-layers 11 --decoder-layers 4 --output student"

_CALIBRATION_ROWS = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", help=f"causal language model: folder, Hub id, or {BUILT_IN!r}")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new folder for the student")
    parser.add_argument("--encoder-layers", type=int, metavar="N", help="encoder layers to keep (default: all)")
    parser.add_argument("--decoder-layers", type=int, metavar="N", help="decoder layers to keep (default: all)")
    parser.add_argument("--cross-attention", choices=("merged", "separate"), default="merged")
    parser.add_argument("--encoder-attention", choices=("causal", "bidirectional"), default="causal")
    parser.add_argument(
        "--layer-selection",
        choices=("influence", "greedy", "even", "first"),
        default="influence",
        help="which layers stay (default: those that change their input most)",
    )
    parser.add_argument(
        "--prompt-template",
        metavar="TEXT",
        help="what the teacher reads, with {source} in it (default: its chat template)",
    )
    add_data_arguments(parser)


def run(args: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..models.rope_encdec import RopeEncDecForConditionalGeneration

    output = new_folder(args.output)
    path = teacher_path(args.teacher)
    rows = load_splits(args.dataset, args.source_column, args.target_column, packages="stdlib")["train"]
    rows = rows.shuffle(seed=0).select(range(min(_CALIBRATION_ROWS, len(rows))))
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(path),
        encoder_num_hidden_layers=args.encoder_layers,
        decoder_num_hidden_layers=args.decoder_layers,
        cross_attention=args.cross_attention,
        encoder_attention=args.encoder_attention,
        layer_selection=args.layer_selection,
        prompt_template=prompt_template(args.prompt_template, args.dataset),
        calibration=list(zip(rows["source"], rows["target"], strict=True)),
    )
    student.save_pretrained(output)
    config = student.config
    print(
        f"{output}: {config.encoder_num_hidden_layers} + {config.decoder_num_hidden_layers} layers, "
        f"{student.num_parameters() / 1e6:.1f} M parameters"
    )


def new_folder(path: str) -> Path:
    """Raises ValueError if something is there already."""
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: choose another folder with --output")
    return folder
