"""Memory and seconds of head, divergence, cross-entropy and their gradient: all targets at once, or chunk by chunk.

    python studies/chunked_loss.py

Student and teacher of hidden size 576 and vocabulary 49,152 (SmolLM2-135M's), bf16 products with the student's head in
fp32, as in training under autocast. Each measurement is a process of its own; rounds are interleaved. Memory is the
peak beyond the inputs: of the device, or resident of the process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tasks import taken_before

from hf_encdec_distill.bench.worker import memory
from hf_encdec_distill.files import write_json


HIDDEN, VOCABULARY = 576, 49_152
TARGETS, FEW_TARGETS = 4096, (128, 256, 512, 1024)
CHUNK_SIZES = (128, 256, 512, 64)
DIVERGENCES = ("forward_kl", "generalized_jsd", "total_variation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/studies/chunked_loss"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=3, metavar=("DIVERGENCE", "TARGETS", "CHUNK"), help="once, and print it")
    args = parser.parse_args()
    if args.measure:
        divergence, targets, chunk_size = args.measure
        print(json.dumps(measure(divergence, int(targets), int(chunk_size))))
        return
    # A chunk as large as all targets is what is computed at once.
    settings = [(DIVERGENCES[0], TARGETS, size) for size in (TARGETS, *CHUNK_SIZES)]
    settings += [(divergence, TARGETS, size) for divergence in DIVERGENCES[1:] for size in (TARGETS, 128)]
    settings += [
        (DIVERGENCES[0], targets, size) for targets in FEW_TARGETS for size in (targets, min(128, targets // 2))
    ]
    file = args.output / "chunked_loss.json"
    taken = taken_before(file, (" ".join(map(str, setting)) for setting in settings))
    for number in range(args.rounds):
        for name, runs in taken.items():
            if len(runs) > number:
                continue
            command = [sys.executable, __file__, "--measure", *name.split()]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs.append(json.loads(output.splitlines()[-1]))
            print(number, name, runs[-1], flush=True)
            write_json(file, taken)
            (args.output / "chunked_loss.md").write_text(table(taken), encoding="utf-8")


def measure(divergence: str, targets: int, chunk_size: int) -> dict:
    """GB at the peak beyond the inputs, and seconds of one loss and its gradient."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    heads = [
        torch.randn(VOCABULARY, HIDDEN, device=device, dtype=dtype) / 24 for dtype in (torch.float, torch.bfloat16)
    ]
    states = [torch.randn(targets, HIDDEN, device=device, dtype=torch.bfloat16) for _ in range(2)]
    labels = torch.randint(VOCABULARY, (targets,), device=device)
    _step(divergence, heads, [state[:8] for state in states], labels[:8], 4)  # allocators and kernels are set up
    before = _memory_now(device)
    start = time.perf_counter()
    _step(divergence, heads, states, labels, chunk_size)
    return {"seconds": time.perf_counter() - start, "gb": _peak_memory(device) - before}


def _step(divergence: str, heads: list, states: list, labels, chunk_size: int) -> None:
    """As the trainer does it: `chunked_sum` where there is more than one chunk, autograd on all logits otherwise."""
    import torch

    from hf_encdec_distill.distillation.losses import chunked_sum, cross_entropy, select_divergence

    distance = select_divergence(divergence)
    weight, hidden = heads[0].detach().requires_grad_(), states[0].detach().requires_grad_()

    def terms(student_logits, chunk=slice(None)):
        with torch.no_grad():
            teacher_logits = torch.nn.functional.linear(states[1][chunk], heads[1])
        return torch.stack([cross_entropy(student_logits, labels[chunk]), distance(student_logits, teacher_logits)])

    if chunk_size < len(labels):
        total, _ = chunked_sum(terms, hidden, weight, chunk_size=chunk_size, term_weights=(0.1, 0.9))
    else:
        total = terms(torch.nn.functional.linear(hidden, weight.to(hidden.dtype))).sum(dim=1) @ torch.tensor(
            [0.1, 0.9], device=hidden.device
        )
    (total / len(labels)).backward()
    if hidden.is_cuda:
        torch.cuda.synchronize()


def _memory_now(device) -> float:
    import torch

    if device.type == "cuda":
        return torch.cuda.memory_allocated() / 1e9
    return memory()["now"] / 1e9  # not the peak: it has the first step in it


def _peak_memory(device) -> float:
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return memory()["peak"] / 1e9


def table(taken: dict[str, list[dict]]) -> str:
    """Markdown: medians over the rounds, and each against all targets at once, round by round."""
    taken = {name: runs for name, runs in taken.items() if runs}
    rounds = len(next(iter(taken.values())))
    lines = [
        f"Hidden size {HIDDEN}, vocabulary {VOCABULARY:,}; {rounds} round(s), medians. Memory is the peak beyond the "
        "inputs.\n",
        "| divergence | targets | chunk | memory, GB | share of all at once | seconds | times all at once |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in taken.items():
        divergence, targets, size = name.split()
        whole = taken[f"{divergence} {targets} {targets}"]
        cells = [
            divergence,
            targets,
            "all" if size == targets else size,
            f"{statistics.median(run['gb'] for run in runs):.2f}",
            f"{statistics.median(run['gb'] / at_once['gb'] for run, at_once in zip(runs, whole)):.2f}",
            f"{statistics.median(run['seconds'] for run in runs):.2f}",
            f"{statistics.median(run['seconds'] / at_once['seconds'] for run, at_once in zip(runs, whole)):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "# The loss in chunks\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
