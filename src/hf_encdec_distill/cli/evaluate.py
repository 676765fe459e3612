"""Measure a model on held-out rows: ROUGE-L, share of distinct outputs, cross-entropy, closeness to a teacher.

MODEL may be an encoder-decoder or a decoder-only model. In brackets: 95 % interval, bootstrap over the rows.
"""

from __future__ import annotations

import argparse
import json

from ._inputs import BUILT_IN, add_data_arguments, load_splits, prompt_template, teacher_path


SUMMARY = "measure a model on held-out rows"
EXAMPLE = "hf-encdec-distill evaluate runs/quickstart/student --teacher runs/quickstart/work/teacher --rows 100"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or Hub id")
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


def run(args: argparse.Namespace) -> None:
    import numpy as np
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    from ..distillation.metrics import distinct_share, rouge_l
    from ._display import table
    from ._evaluation import encode_rows, generate, interval, score
    from ._training import device, working_dtype

    if args.rows < 1:
        raise ValueError(f"--rows {args.rows}: give at least 1")
    config = AutoConfig.from_pretrained(args.model)
    loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = loader.from_pretrained(args.model, dtype=working_dtype()).to(device()).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    teacher = teacher_tokenizer = None
    if args.teacher is not None:
        path = teacher_path(args.teacher)
        teacher = AutoModelForCausalLM.from_pretrained(path, dtype=working_dtype()).to(device()).eval()
        teacher_tokenizer = AutoTokenizer.from_pretrained(path)

    pairs = load_splits(args.dataset, args.source_column, args.target_column, packages="stdlib")["test"]
    pairs = pairs.shuffle(seed=0).select(range(min(args.rows, len(pairs))))
    template = prompt_template(args.prompt_template, args.dataset)
    rows = encode_rows(pairs, teacher_tokenizer or tokenizer, template, args.max_source_length, args.max_target_length)
    if config.is_encoder_decoder:
        merged = getattr(config, "cross_attention", None) == "merged"
        for row in rows:
            length = args.max_source_length - merged  # the start token is one of the prompt's
            row["inputs"] = tokenizer(row["source"], truncation=True, max_length=length)["input_ids"]
            if merged:
                row["prompt"] = [*row["inputs"], config.decoder_start_token_id]

    sums = score({"model": model}, rows, teacher)["model"]
    texts = generate(model, tokenizer, rows, args.max_target_length)
    tokens = np.array([len(row["labels"]) for row in rows])
    rouge = np.array([rouge_l(text, row["target"]) for text, row in zip(texts, rows, strict=True)])
    result = {name: interval(values, tokens) for name, values in sums.items()}
    result |= {"rouge_l": interval(rouge, np.ones(len(rows))), "distinct": distinct_share(texts), "n": len(rows)}
    if args.json:
        print(json.dumps(result, indent=1))
        return
    print(table(["", args.model], [[name, _cell(value)] for name, value in result.items()]))


def _cell(value) -> str:
    if isinstance(value, dict):
        return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
