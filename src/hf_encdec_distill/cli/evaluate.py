"""Measure models on held-out rows: ROUGE-L, share of distinct outputs, cross-entropy, closeness to a teacher.

MODEL may be an encoder-decoder or a decoder-only model. In brackets: 95 % interval, bootstrap over the rows. Several
models are measured on the same rows, and each is compared with the first: difference, its interval, and p of a paired
sign-flip permutation test.
"""

from __future__ import annotations

import argparse
import json

from ._inputs import BUILT_IN, add_data_arguments, load_splits, prompt_template, teacher_path
from .init import new_folder


SUMMARY = "measure models on held-out rows"
EXAMPLE = "hf-encdec-distill evaluate runs/quickstart/student --teacher runs/quickstart/work/teacher --rows 100"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder or Hub id")
    parser.add_argument("--teacher", help=f"decoder-only model to compare with: folder, Hub id, or {BUILT_IN!r}")
    add_data_arguments(parser)
    parser.add_argument("--rows", type=int, default=200, metavar="N", help="test rows (default: %(default)s)")
    parser.add_argument("--max-source-length", type=int, default=256, metavar="TOKENS", help="default: %(default)s")
    parser.add_argument("--max-target-length", type=int, default=32, metavar="TOKENS", help="default: %(default)s")
    parser.add_argument(
        "--prompt-template",
        metavar="TEXT",
        help="what a decoder-only model reads, with {source} in it (default: its chat template); a merged student has "
        "it built in",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", metavar="FOLDER", help="new folder for metrics.json and quality.png")


def run(args: argparse.Namespace) -> None:
    import numpy as np
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..distillation.metrics import distinct_share
    from ._display import table
    from ._evaluation import interval, p_value
    from ._state import write_json
    from ._training import device, working_dtype

    if args.rows < 1:
        raise ValueError(f"--rows {args.rows}: give at least 1")
    if len(set(args.models)) < len(args.models):
        raise ValueError("a model is named twice: name each once")
    output = None if args.output is None else new_folder(args.output)
    teacher = teacher_tokenizer = None
    if args.teacher is not None:
        path = teacher_path(args.teacher)
        teacher = AutoModelForCausalLM.from_pretrained(path, dtype=working_dtype()).to(device()).eval()
        teacher_tokenizer = AutoTokenizer.from_pretrained(path)
    pairs = load_splits(args.dataset, args.source_column, args.target_column, packages="stdlib")["test"]
    pairs = pairs.shuffle(seed=0).select(range(min(args.rows, len(pairs))))

    measured: dict[str, dict] = {}
    for name in args.models:
        measured[name] = _measure(name, pairs, args, teacher, teacher_tokenizer)
        if measured[name]["labels"] != measured[args.models[0]]["labels"]:
            raise ValueError(
                f"{name} and {args.models[0]} cut targets into different tokens, so that their cross-entropies do not "
                "compare: evaluate them one by one"
            )
    tokens = np.array([len(labels) for labels in measured[args.models[0]]["labels"]])

    # By model and measure: sums over the tokens or texts of each row, and how many those are.
    per_row = {
        name: {measure: (values, tokens) for measure, values in measured[name]["sums"].items()}
        | {"rouge_l": (measured[name]["rouge_l"], np.ones(len(pairs)))}
        for name in args.models
    }
    models = {
        name: {measure: interval(values, weights) for measure, (values, weights) in per_row[name].items()}
        | {"distinct": distinct_share(measured[name]["texts"]), "n": len(pairs)}
        for name in args.models
    }
    differences = []
    for name in args.models[1:]:
        difference = {"of": name, "minus": args.models[0]}
        for measure, (values, weights) in per_row[name].items():
            change = values - per_row[args.models[0]][measure][0]
            difference[measure] = interval(change, weights) | {"p": p_value(change)}
        differences.append(difference)
    result = {"models": models, "differences": differences}
    if output is not None:
        from ..bench import plot_quality

        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "metrics.json", result)
        plot_quality(models, output / "quality.png", f"95 % interval, bootstrap over {len(pairs)} rows")
    if args.json:
        print(json.dumps(result, indent=1))
        return
    measures = [*models[args.models[0]]]
    print(table(["", *args.models], [[m, *(_cell(models[name][m]) for name in args.models)] for m in measures]))
    for difference in differences:
        print(f"\n{difference['of']} minus {difference['minus']}")
        print(table(["", "", "p"], [[m, _cell(d), f"{d['p']:.4f}"] for m, d in difference.items() if m in measures]))


def _measure(name: str, pairs, args: argparse.Namespace, teacher, teacher_tokenizer) -> dict:
    """Row by row: `sums` as `_evaluation.score` gives them, `rouge_l`; and the `texts` and target `labels`."""
    import numpy as np
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    from ..distillation.metrics import rouge_l
    from ._evaluation import encode_rows, generate, score
    from ._training import device, working_dtype

    config = AutoConfig.from_pretrained(name)
    loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = loader.from_pretrained(name, dtype=working_dtype()).to(device()).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    template = prompt_template(args.prompt_template, args.dataset)
    rows = encode_rows(pairs, teacher_tokenizer or tokenizer, template, args.max_source_length, args.max_target_length)
    if config.is_encoder_decoder:
        merged = getattr(config, "cross_attention", None) == "merged"
        for row in rows:
            length = args.max_source_length - merged  # the start token is one of the prompt's
            row["inputs"] = tokenizer(row["source"], truncation=True, max_length=length)["input_ids"]
            if merged:
                row["prompt"] = [*row["inputs"], config.decoder_start_token_id]
    texts = generate(model, tokenizer, rows, args.max_target_length)
    return {
        "sums": score({"model": model}, rows, teacher)["model"],
        "rouge_l": np.array([rouge_l(text, row["target"]) for text, row in zip(texts, rows, strict=True)]),
        "texts": texts,
        "labels": [row["labels"] for row in rows],
    }


def _cell(value) -> str:
    if isinstance(value, dict):
        return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
