"""Count what a model costs: parameters per side, FLOPs and bytes per token, and the first token against its teacher.

All of it is counted from the config; no weights are loaded.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ._display import say_result, table, wrap
from ._inputs import BUILT_IN, teacher_path


if TYPE_CHECKING:
    from transformers import PretrainedConfig


SUMMARY = "parameters, FLOPs and bytes of a model"
EXAMPLE = "hf-encdec-distill info runs/quickstart/student --prompt-length 512"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=f"student or decoder-only model: folder, Hub id, or {BUILT_IN!r}")
    parser.add_argument(
        "--teacher",
        metavar="MODEL",
        help=f"decoder-only model to compare with, or {BUILT_IN!r} (default: the one that the student came from)",
    )
    parser.add_argument(
        "--prompt-length",
        type=int,
        default=192,
        metavar="TOKENS",
        help="prompt of the request that is counted (default: %(default)s)",
    )
    parser.add_argument(
        "--new-tokens", type=int, default=32, metavar="TOKENS", help="its answer (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="bfloat16",
        help="dtype of weights and cache, for the count of bytes (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    import torch

    from ..bench import compare_cost, decoder_only_config, model_cost
    from ..models.loading import base_of, load_config

    config = load_config(teacher_path(args.model))
    request = (args.prompt_length, args.new_tokens, getattr(torch, args.dtype))
    teacher: PretrainedConfig | None
    if args.teacher is not None:
        teacher = load_config(base_of(teacher_path(args.teacher)))
    else:
        teacher = decoder_only_config(config) if config.model_type == "rope_encdec" else None
    if teacher is None:
        costs, ratio = {"model": model_cost(config, *request).to_dict()}, None
        content = costs["model"]
    else:
        content = compare_cost(config, teacher, *request).to_dict()
        costs, ratio = {"model": content["student"], "teacher": content["teacher"]}, content["ratio"]
        ratio["total"] = ratio["parameters"]
    say_result(args, content, _page(args, costs, ratio))


def _page(args: argparse.Namespace, costs: dict[str, dict], ratio: dict[str, float] | None) -> str:
    lines = [
        (f"parameters, {side}", 1e6, "M", lambda cost, side=side: cost["parameters"][side], side)
        for side in ("embedding", "encoder", "decoder", "head", "total")
    ]
    lines += [
        (title, unit, suffix, lambda cost, name=name: cost[name], name)
        for title, unit, suffix, name in (
            ("first token", 1e9, "GFLOP", "first_token_flops"),
            ("each further token", 1e9, "GFLOP", "flops_per_token"),
            ("read per token", 1e6, "MB", "bytes_per_token"),
            ("cache at the end", 1e6, "MB", "kv_cache_bytes"),
        )
    ]
    body = [
        [
            f"{title}, {suffix}",
            *(f"{value(cost) / unit:.2f}" for cost in costs.values()),
            *([f"{ratio[name]:.2f}" if name in ratio else ""] if ratio else []),
        ]
        for title, unit, suffix, value, name in lines
    ]
    header = [costs["model"]["kind"], *(["model", "teacher", "model / teacher"] if ratio else ["model"])]
    request = f"{args.prompt_length} tokens in, {args.new_tokens} out, batch 1, {args.dtype}"
    return f"{wrap(f'{args.model}: {request}')}\n\n{table(header, body)}"
