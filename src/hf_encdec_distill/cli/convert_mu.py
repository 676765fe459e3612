"""Convert Microsoft's Mu checkpoint (github.com/microsoft/encoder-decoder-slm) to a folder that AutoModel loads."""

from __future__ import annotations

import argparse

from ..files import filling
from ._display import say_result
from ._inputs import check_is_there


SUMMARY = "convert Microsoft's Mu checkpoint"
EXAMPLE = "hf-encdec-distill convert-mu model.pt config.json --output mu"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="the .pt file")
    parser.add_argument("config", nargs="?", help="the .json file beside it (default: what the checkpoint records)")
    parser.add_argument("--bos-token-id", type=int, default=1, metavar="ID", help="start of a target (default: 1)")
    parser.add_argument("--eos-token-id", type=int, default=32000, metavar="ID", help="its end (default: 32000)")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new folder for the model")


def run(args: argparse.Namespace) -> None:
    from ..models.rope_encdec.convert_mu import convert_mu_checkpoint
    from .init import new_folder

    output = new_folder(args.output)
    check_is_there(args.checkpoint, "the .pt file of Mu's checkpoint")
    if args.config is not None:
        check_is_there(args.config, "the .json file beside the checkpoint, or leave it out")
    ids = {"bos_token_id": args.bos_token_id, "eos_token_id": args.eos_token_id}
    model = convert_mu_checkpoint(args.checkpoint, args.config, **ids)
    with filling(output) as partial:
        model.save_pretrained(partial)
    parameters = model.num_parameters()
    content = {"output": str(output), "parameters": parameters}
    say_result(args, content, f"{output}: {parameters / 1e6:.1f} M parameters")
