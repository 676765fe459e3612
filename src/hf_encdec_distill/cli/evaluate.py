"""Measure models on held-out rows: ROUGE-L and other text measures, closeness to a teacher, calibration, a judge.

MODEL is an encoder-decoder or a decoder-only model. In brackets: 95 % interval, bootstrap over the rows. All models
are measured on the same rows, and each is compared with the first: difference, its interval, and p of a paired
permutation test. The baseline answers with the first sentence of the source. docs/evaluation.md explains the measures
and what --output writes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..progress import progress
from ._display import say_result, table, wrap
from ._inputs import (
    BUILT_IN,
    add_data_arguments,
    check_at_least_one,
    dataset_name,
    load_test_rows,
    prompt_template,
    public_name,
    teacher_path,
)
from .init import new_folder


if TYPE_CHECKING:
    from ..metrics.significance import Sums

SUMMARY = "measure models on held-out rows"
EXAMPLE = "hf-encdec-distill evaluate runs/quickstart/student --teacher runs/quickstart/work/teacher --rows 100"

# Those that need a teacher are left out of the default without one. `judge` comes with --judge.
_DEFAULT = ("rouge_l", "ce", "kl", "teacher_agreement", "distinct")
_OTHERS = ("exact_match", "f1", "chrf", "bleu", "ece", "entropy_gap")
logger = logging.getLogger(__name__)

_BASELINE = "lead_baseline"  # as the quickstart calls it
_LONGEST_NAME = 180  # bytes of a model's path in the name of a file, which may have 255 with all that is put around it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help=f"folder, Hub id, or {BUILT_IN!r}")
    parser.add_argument("--teacher", help=f"decoder-only model to compare with: folder, Hub id, or {BUILT_IN!r}")
    add_data_arguments(parser)
    parser.add_argument("--rows", type=int, default=200, metavar="N", help="test rows (default: %(default)s)")
    parser.add_argument("--max-source-length", type=int, default=256, metavar="TOKENS", help="default: %(default)s")
    parser.add_argument("--max-target-length", type=int, default=32, metavar="TOKENS", help="default: %(default)s")
    parser.add_argument(
        "--prompt-template",
        metavar="TEXT",
        help="prompt of a decoder-only model, with {source} in it (default: its chat template); a merged student has "
        "its own",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=(*_DEFAULT, *_OTHERS),
        metavar="NAME",
        help=f"any of {' '.join((*_DEFAULT, *_OTHERS))} (default: the first {len(_DEFAULT)})",
    )
    parser.add_argument(
        "--judge", metavar="MODEL", help=f"causal language model that rates answers: folder, Hub id, or {BUILT_IN!r}"
    )
    parser.add_argument(
        "--judge-template",
        metavar="TEXT",
        help="prompt of the judge, or a file with it; {source}, {reference} and {prediction} are filled in",
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="new folder for metrics.json, quality.png and .svg, answers.jsonl and a model-index per model",
    )
    parser.add_argument(
        "--update-card",
        action="store_true",
        help="write the results into the README.md of each MODEL that is a folder",
    )


def run(args: argparse.Namespace) -> None:
    from ..cards import update_model_card
    from ..devices import device, working_dtype
    from ..evaluation.judge import Judge
    from ..metrics.measures import OF_TEACHER
    from ..models.loading import load_teacher, load_tokenizer

    cards = _check(args)
    output = None if args.output is None else new_folder(args.output)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    asked = [name for name in args.metrics or _DEFAULT if args.teacher is not None or name not in OF_TEACHER]

    teacher = teacher_tokenizer = None
    if args.teacher is not None:
        path = teacher_path(args.teacher)
        teacher = load_teacher(path, dtype=working_dtype()).to(device())
        teacher_tokenizer = load_tokenizer(path)
    pairs = load_test_rows(args)
    pairs = pairs.shuffle(seed=0).select(range(min(args.rows, len(pairs))))
    judge = None if args.judge is None else Judge(teacher_path(args.judge), args.judge_template, list(pairs))

    measured: dict[str, dict] = {}
    for name in args.models:
        measured[name] = _measure(name, asked, pairs, args, teacher, teacher_tokenizer)
        if measured[name]["labels"] != measured[args.models[0]]["labels"]:
            raise ValueError(
                f"{name} and {args.models[0]} cut targets into different tokens, so that their cross-entropies do not "
                "compare: evaluate them one by one"
            )
    del teacher
    if measured[args.models[0]]["texts"] is not None:
        measured[_BASELINE] = _measure_baseline(asked, pairs)
    judged = {} if judge is None else _rate(judge, args, measured)
    _check_finite(measured)
    result = _compare(measured, len(pairs)) | _provenance(args, len(pairs)) | judged
    say_result(args, result, _page(args, result))  # first: a disk that is full shall not take the numbers along
    if output is not None:
        _write(output, result, pairs, measured)
    for name in cards:
        update_model_card(name, result, name)


def _check(args: argparse.Namespace) -> list[str]:
    """The models whose cards are to be updated.

    Raises:
        ValueError: options out of range or at odds, or a card that cannot be updated, before anything is measured.
    """
    from ..cards.index import load_card
    from ..metrics.measures import OF_TEACHER

    check_at_least_one(args, "rows", "max_source_length", "max_target_length")
    args.dataset = os.path.expanduser(args.dataset)
    if len(set(args.models)) < len(args.models):
        raise ValueError("a model is named twice: name each once")
    taken = [name for name in (_BASELINE, "source", "reference") if name in args.models]
    if taken:
        raise ValueError(f"{taken[0]} is what a part of the result is called: name the folder as ./{taken[0]}")
    alone = [name for name in args.metrics or () if name in OF_TEACHER and args.teacher is None]
    if alone:
        raise ValueError(f"--metrics {alone[0]} compares with a teacher: name one with --teacher")
    if args.judge_template is not None and args.judge is None:
        raise ValueError("--judge-template without --judge: name the model that is to rate answers, or leave it out")
    cards = [name for name in args.models if args.update_card and (Path(name) / "README.md").is_file()]
    if args.update_card and not cards:
        raise ValueError(f"--update-card: there is no README.md in {', '.join(args.models)}; leave the option out")
    for name in cards:
        load_card(name)
    return cards


def _rate(judge, args: argparse.Namespace, measured: Mapping[str, Mapping]) -> dict[str, Any]:
    """Adds the judge's scores to those of each model; returns what `metrics.json` says of the judge."""
    import numpy as np

    from ..metrics.significance import mean

    scores, of_digits = judge.rate({name: entry["texts"] for name, entry in measured.items()})
    for name, entry in measured.items():
        entry["sums"]["judge"] = mean(scores[name], np.ones(len(scores[name])))
    return {
        "judge": {"name": _model_name(args.judge), "template": judge.template, "probability_of_a_digit": of_digits}
    }


def _check_finite(measured: Mapping[str, Mapping]) -> None:
    import numpy as np

    for name, entry in measured.items():
        for measure, sums in entry["sums"].items():
            if not np.isfinite(sums.rows).all():
                raise ValueError(
                    f"{measure} of {name} is not a finite number on some rows: its weights or logits are not"
                )


def _measure(
    name: str, measures: list[str], pairs, args: argparse.Namespace, teacher, teacher_tokenizer
) -> dict[str, Any]:
    """The `Sums` of each measure as `sums`, those without as `plain`; the target `labels` and the answers `texts`."""
    import numpy as np

    from ..devices import device, working_dtype
    from ..evaluation.scoring import encode_rows, generate, read_by_encoder, score
    from ..export.manifest import MANIFEST
    from ..metrics.measures import OF_LOGITS, OF_TEACHER
    from ..metrics.significance import calibration_error, mean
    from ..models.loading import load_config, load_student, load_teacher, load_tokenizer

    path = teacher_path(name)
    if (Path(path) / MANIFEST).is_file():
        raise ValueError(
            f"{name} is an export, whose parity.json compares it with the student: name the student that it was made "
            "from"
        )
    config = load_config(path)
    load = load_student if config.is_encoder_decoder else load_teacher
    model = load(path, dtype=working_dtype()).to(device())
    tokenizer = load_tokenizer(path)
    template = prompt_template(args.prompt_template, args.dataset)
    limits, day = (args.max_source_length, args.max_target_length), getattr(config, "prompt_date", None)
    of_teacher = [measure for measure in measures if measure in OF_TEACHER]
    reader = tokenizer
    if of_teacher:
        _check_same_ids(name, config, tokenizer, args.teacher, teacher.config, teacher_tokenizer, of_teacher)
        # A decoder-only student has the prompt that it was trained on as its chat template.
        reader = teacher_tokenizer if config.is_encoder_decoder else tokenizer
    rows = encode_rows(pairs, reader, template, *limits, day)
    if config.is_encoder_decoder:
        read_by_encoder(rows, tokenizer, config, args.max_source_length)
    of_logits = [measure for measure in measures if measure in OF_LOGITS]
    of_texts = [measure for measure in measures if measure not in OF_LOGITS]
    labels = [row["labels"] for row in rows]
    tokens = np.array([len(row) for row in labels])
    found: dict[str, Sums] = {}
    if of_logits:
        with progress(name) as update:
            scores = score({name: model}, rows, teacher if of_teacher else None, update, of_logits)[name]
        for measure, values in scores.items():
            found[measure] = (calibration_error if measure == "ece" else mean)(values, tokens)
    texts: list[str] | None = None
    plain: dict[str, float] = {}
    if of_texts or args.judge is not None:
        with progress(name) as update:
            texts = generate(model, tokenizer, rows, args.max_target_length, update)
        of_answers, plain = _measure_answers(of_texts, texts, rows)
        found |= of_answers
    sums = {measure: found[measure] for measure in measures if measure in found}  # in the order asked for
    return {"sums": sums, "plain": plain, "labels": labels if of_logits else None, "texts": texts}


def _check_same_ids(
    name: str, config, tokenizer, teacher: str, teacher_config, teacher_tokenizer, measures: Sequence[str]
) -> None:
    """
    Raises:
        ValueError: an id stands for one token to the model and for another to the teacher.
    """
    from ..distillation.alignment.vocabularies import SharedVocabulary, vocab_size

    try:
        SharedVocabulary.between(vocab_size(config), vocab_size(teacher_config), tokenizer, teacher_tokenizer)
    except ValueError as error:
        raise ValueError(
            f"{name} and --teacher {teacher} have other tokens, so that {', '.join(measures)} cannot compare their "
            "ids: leave --teacher out, or name one of the same vocabulary, such as the work/teacher of a quickstart"
        ) from error


def _measure_baseline(measures: list[str], pairs) -> dict[str, Any]:
    """As `_measure`, what answers alone can be measured by."""
    from ..data import lead_sentence
    from ..metrics.measures import OF_LOGITS

    texts = [lead_sentence(source) for source in pairs["source"]]
    sums, plain = _measure_answers([measure for measure in measures if measure not in OF_LOGITS], texts, list(pairs))
    return {"sums": sums, "plain": plain, "labels": None, "texts": texts}


def _measure_answers(measures: list[str], texts: list[str], rows: Sequence[dict]) -> tuple[dict, dict]:
    from ..metrics.measures import measure_texts
    from ..metrics.texts import distinct_share

    sums = measure_texts([measure for measure in measures if measure != "distinct"], texts, rows)
    # The same answer twice in a draw is no repetition: no interval.
    return sums, {"distinct": distinct_share(texts)} if "distinct" in measures else {}


def _compare(measured: Mapping[str, Mapping], rows: int) -> dict[str, Any]:
    """`models` and `differences` from the first of them, as in `metrics.json`, with p-values."""
    from ..metrics.significance import interval, p_value

    base, *others = (name for name in measured if name != _BASELINE)
    first = measured[base]["sums"]
    differences = []
    for name in others:
        sums = measured[name]["sums"]
        numbers = {
            measure: interval(sums[measure], first[measure]) | {"p": p_value(sums[measure], first[measure])}
            for measure in sums
        }
        differences.append({"of": name, "minus": base, **numbers})
    models = {
        name: {measure: interval(sums) for measure, sums in entry["sums"].items()} | entry["plain"] | {"n": rows}
        for name, entry in measured.items()
    }
    labels = {name: public_name(name) for name in (base, *others)}
    if len(set(labels.values())) == len(labels):
        for name, label in labels.items():
            models[name]["label"] = label
    signatures = {measure: sums.signature for measure, sums in first.items() if sums.signature}
    return {"models": models, "differences": differences, "signatures": signatures}


def _provenance(args: argparse.Namespace, rows: int) -> dict[str, Any]:
    """What was measured on, and against what, in the words of `metrics.json`."""
    data = {"name": dataset_name(args.dataset), "test_rows": rows}
    if args.dataset != BUILT_IN and not Path(args.dataset).exists():
        data["hub_id"] = args.dataset
    return {
        "data": data,
        **({} if args.teacher is None else {"teacher": {"name": _model_name(args.teacher)}}),
        "spread": f"95 % interval, bootstrap over {rows} rows",
    }


def _model_name(path: str) -> str:
    from ..data.builtin_teacher import HUB_ID

    return HUB_ID if path == BUILT_IN else public_name(path)


def _write(output: Path, result: Mapping, pairs, measured: Mapping[str, Mapping]) -> None:
    from ..cards import model_index
    from ..files import write_json, write_text

    write_json(output / "metrics.json", result)
    files: set[str] = set()
    for name in (name for name in measured if name != _BASELINE):
        end = name.strip("./").replace("/", "--").encode()[-_LONGEST_NAME:].decode(errors="ignore")
        file = f"model-index-{end}"
        while file in files:  # ./student and ../student
            file += "-"
        files.add(file)
        write_text(output / f"{file}.yml", model_index(result, name, public_name(name)))
    if all(entry["texts"] is not None for entry in measured.values()):
        lines = (
            {
                "source": pair["source"],
                "reference": pair["target"],
                **{name: _answer(entry, index) for name, entry in measured.items()},
            }
            for index, pair in enumerate(pairs)
        )
        write_text(output / "answers.jsonl", "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))
    try:
        from ..bench import plot_quality

        plot_quality(result["models"], output / "quality.png", result["spread"])
    except ImportError as error:  # the numbers are there without it
        logger.warning("no plots: %s", error)


def _answer(entry: Mapping, index: int) -> dict[str, Any]:
    """What a model wrote for a row, and what each measure that is a mean over rows gave it."""
    of_a_row = ("rouge_l", "exact_match", "f1", "judge")
    scores = {name: float(entry["sums"][name].rows[index, 0]) for name in of_a_row if name in entry["sums"]}
    return {"answer": entry["texts"][index], **scores}


def _page(args: argparse.Namespace, result: Mapping) -> str:
    from ..metrics.measures import METRICS, model_label

    models = result["models"]
    measures = [measure for measure in models[args.models[0]] if measure in METRICS]
    header = [f"{result['data']['test_rows']} rows", *(model_label(name, models) for name in models)]
    parts = [table(header, [[_heading(m), *(_cell(entry.get(m), m) for entry in models.values())] for m in measures])]
    for difference in result["differences"]:
        rows = [[_heading(m), _cell(d, m), f"{d['p']:.4f}"] for m, d in difference.items() if m in measures]
        title = wrap(" minus ".join(model_label(difference[side], models) for side in ("of", "minus")))
        parts.append(f"{title}\n{table(['', '', 'p'], rows)}")
    return "\n\n".join(parts)


def _heading(measure: str) -> str:
    """With its unit, or where there is none its scale."""
    from ..metrics.measures import METRICS

    heading = METRICS[measure][0]
    return heading if "," in heading else f"{heading}, 0 to 100"


def _cell(value, measure: str) -> str:
    """An estimate, or a number, as the card shows it: shares times 100."""
    from ..metrics.measures import METRICS

    _, factor, decimals, _ = METRICS[measure]
    if value is None:
        return "-"
    if not isinstance(value, Mapping):
        return f"{factor * value:.{decimals}f}"
    shown, low, high = (f"{factor * value[key]:.{decimals}f}" for key in ("value", "low", "high"))
    return f"{shown} [{low}, {high}]"
