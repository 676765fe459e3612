"""Whether a server says of the built-in teacher what PyTorch says here: the same rows captured from both.

    python studies/served_captures.py http://localhost:8000 --teacher FOLDER

The server has to serve the model in FOLDER (the built-in teacher's if none is given) in `--dtype`, and to read 2,048
tokens. vLLM does so without a GPU, too, from a wheel for CPUs:

    vllm serve FOLDER --dtype float32 --max-model-len 2048

A third of the rows have eight functions in their prompts, so that a server that reads long prompts in parts does so.
Differences are of the same token where both records have it. Results go to
docs/studies/served/<software>-<dtype>.json.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from hf_encdec_distill.bench.latency import machine_description
from hf_encdec_distill.data import PROMPT_TEMPLATE, fetch_builtin_teacher, load_python_docstrings
from hf_encdec_distill.distillation import CachedTeacher, LiveTeacher, ServedTeacher, capture
from hf_encdec_distill.files import write_json


MAX_SOURCE, MAX_TARGET, JOINED = 1792, 64, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--teacher", type=Path, help="folder of the model that is served; the built-in teacher's")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of both")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path("docs/studies/served"))
    options = parser.parse_args()
    folder = options.teacher or fetch_builtin_teacher()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = some_rows(options.rows)
    begin = time.perf_counter()
    there = ServedTeacher(options.url, tokenizer, k=options.k, requests=options.requests)
    seconds = {"start": time.perf_counter() - begin}
    here = LiveTeacher.load(folder, options.dtype)
    limits = {"prompt_template": PROMPT_TEMPLATE, "max_source_length": MAX_SOURCE, "max_target_length": MAX_TARGET}
    records = {}
    with tempfile.TemporaryDirectory() as work:
        for name, teacher in {"served": there, "here": here}.items():
            k = {"k": there.k} if name == "here" else {}
            begin = time.perf_counter()
            capture(teacher, rows, Path(work) / name, tokenizer, **k, **limits)
            seconds[name] = time.perf_counter() - begin
            records[name] = {row["key"]: row for row in CachedTeacher(Path(work) / name).records}
    found = {
        "software": there.software,
        "k": there.k,
        "dtype": options.dtype,
        **differences(records["served"], records["here"], there.k),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "machine": machine_description(),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / f"{there.software.replace(' ', '-')}-{options.dtype}.json", found)
    for name, value in found.items():
        print(f"{name}: {value}")


def some_rows(number: int) -> list[dict[str, str]]:
    pairs = load_python_docstrings("all")["test"].shuffle(seed=0)
    rows, functions = [], iter(pairs)
    for index in range(number):
        several = [next(functions) for _ in range(JOINED if index % 3 == 0 else 1)]
        rows.append({"source": "\n\n".join(row["source"] for row in several), "target": several[-1]["target"]})
    return rows


def differences(served: dict, here: dict, k: int) -> dict[str, float]:
    """In nats; `other_first` is the share of positions whose likeliest token is another."""
    if served.keys() != here.keys():
        raise ValueError(f"{len(served.keys() ^ here.keys())} rows are in one of the two caches alone.")
    apart, tails, missing, other_first, targets = [], [], 0, 0, 0
    for key, row in served.items():
        ids, others = row["ids"].reshape(-1, k), here[key]["ids"].reshape(-1, k)
        same = ids[:, :, None] == others[:, None, :]  # [T, k, k]
        values, others_values = (one["log_probs"].reshape(-1, k) for one in (row, here[key]))
        apart.append(np.abs(values[:, :, None] - others_values[:, None, :])[same])
        missing += int((~same.any(axis=-1)).sum())
        other_first += int((ids[:, 0] != others[:, 0]).sum())
        tails.append(np.abs(row["tail"] - here[key]["tail"]))
        targets += len(ids)
    all_apart, all_tails = np.concatenate(apart), np.concatenate(tails)
    return {
        "rows": len(served),
        "targets": targets,
        "log_prob_largest": float(all_apart.max()),
        "log_prob_mean": float(all_apart.mean()),
        "tail_largest": float(all_tails.max()),
        "tail_mean": float(all_tails.mean()),
        "of_one_record_alone": missing / (targets * k),
        "other_first": other_first / targets,
    }


if __name__ == "__main__":
    main()
