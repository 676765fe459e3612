"""Whether fused operators make the ONNX graphs faster: which are in the graphs, and their processor time.

    python studies/onnx_fusions.py runs/quickstart/student --work runs/studies/onnx_fusions

Each form is exported and loaded by ONNX Runtime with all of its own optimisations. One thread, batch 1, prompts
without pads; processor time of that thread, so that other work on the machine counts little. Sessions are new in
each round, since where one finds its memory moves a decoder step by up to 9 %; so is the order. `again` is
the first form a second time: what a ratio says when nothing has changed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime
import torch

from hf_encdec_distill import RopeEncDecForConditionalGeneration
from hf_encdec_distill.export import modules
from hf_encdec_distill.export import onnx as target
from hf_encdec_distill.export.backends import backend_of
from hf_encdec_distill.export.recipe import Shapes, graphs
from hf_encdec_distill.files import write_json


BASE, AGAIN = "opset 18", "opset 18, again"
FORMS = {
    BASE: {},
    "opset 23": {"opset": 23},  # torch.onnx makes `RMSNormalization` and `Attention` of what it finds
    "opset 23, RotaryEmbedding": {"opset": 23, "rotary": True},  # and the heads of a group not folded into time
    "GroupQueryAttention": {"causal": True},  # ONNX Runtime's own; encoder only, and it knows no pad on the left
}
FUSED = ("RMSNormalization", "RotaryEmbedding", "Attention", "GroupQueryAttention", "QuickGelu", "FusedMatMul")
RUNS = {("encoder", 200): 3, ("encoder", 1024): 1, ("decoder", 200): 20, ("decoder", 1024): 20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/studies/onnx_fusions"), help="for the graphs")
    parser.add_argument("--output", type=Path, default=Path("docs/studies/onnx_fusions"))
    parser.add_argument("--variant", nargs="+", default=["fp32", "int8"])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    results = {}
    for variant in args.variant:
        folders = {form: export(args.student, form, variant, args.work) for form in FORMS}
        results[variant] = {
            "operators": {f: {g: operators(folders[f], g) for g in ("encoder", "decoder")} for f in FORMS},
            "milliseconds": {f"{g} {length}": measure(folders, g, length, args.rounds) for g, length in RUNS},
        }
        write_json(args.output / "onnx_fusions.json", results)
        (args.output / "onnx_fusions.md").write_text(table(results), encoding="utf-8")


def export(student: Path, form: str, variant: str, work: Path) -> Path:
    folder = work / f"{form}, {variant}"
    if folder.exists():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    model = RopeEncDecForConditionalGeneration.from_pretrained(student).eval()
    options = FORMS[form]
    with ExitStack() as patches, torch.no_grad():
        patches.enter_context(patch.object(target, "OPSET", options.get("opset", target.OPSET)))
        if "rotary" in options:
            patches.enter_context(patch.object(modules, "apply_rotary_pos_emb", rotary_embedding))
            patches.enter_context(patch.object(modules, "grouped_attention", unfolded_attention))
        if "causal" in options:
            if model.config.encoder_attention != "causal":
                raise ValueError(f"{form} is causal, {student} has a bidirectional encoder: give a causal one")
            forward = modules.ExportedEncoder.forward

            def causal_forward(self, input_ids, attention_mask):
                with patch.object(modules, "grouped_attention", group_query_attention):
                    return forward(self, input_ids, attention_mask)

            patches.enter_context(patch.object(modules.ExportedEncoder, "forward", causal_forward))
        shapes = Shapes()
        recipe = graphs(model.config, shapes)
        backend_of("onnx").export(model, recipe, shapes, variant, False, partial, "unknown", {})
    return partial.rename(folder)


def rotary_embedding(x, position_embeddings):
    cos, sin = (half[..., : half.shape[-1] // 2].expand(x.shape[0], -1, -1) for half in position_embeddings)
    return torch.onnx.ops.rotary_embedding(x, cos, sin)


def unfolded_attention(query, key, value, bias):
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=True)
    return output.transpose(1, 2).flatten(2)


def group_query_attention(query, key, value, bias):
    flat = [x.transpose(1, 2).flatten(2) for x in (query, key, value)]
    length = query.shape[2]
    last = torch.ones(query.shape[0], dtype=torch.int32) * (length - 1)
    total = torch.ones((), dtype=torch.int32) * length
    output, _, _ = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        [*flat, None, None, last, total],
        {"num_heads": query.shape[1], "kv_num_heads": key.shape[1]},
        dtypes=[torch.float32] * 3,
        shapes=[flat[0].shape, key.shape, value.shape],
        version=1,
    )
    return output


def session(folder: Path, graph: str, **settings) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    for name, value in settings.items():
        setattr(options, name, value)
    return onnxruntime.InferenceSession(str(folder / f"{graph}_model.onnx"), options)


def operators(folder: Path, graph: str) -> dict[str, int]:
    """Types of operators and their number, after ONNX Runtime's own optimisations."""
    path = folder / f"{graph}_optimized.onnx"
    session(folder, graph, optimized_model_filepath=str(path))
    nodes = onnx.load(path, load_external_data=False).graph.node
    path.unlink()
    return dict(Counter(node.op_type for node in nodes).most_common())


def measure(folders: dict[str, Path], graph: str, length: int, rounds: int) -> dict[str, dict]:
    """Milliseconds of the fastest run of each round; largest difference to the first form's outputs, as a share."""
    forms = {**folders, AGAIN: folders[BASE]}
    taken: dict[str, list[float]] = {form: [] for form in forms}
    outputs = {}
    for _ in range(rounds):
        for form in random.sample(list(forms), len(forms)):
            running = session(forms[form], graph)
            inputs = example(running, length)
            outputs[form] = running.run(None, inputs)
            times = []
            for _ in range(RUNS[graph, length]):
                start = time.thread_time()
                running.run(None, inputs)
                times.append(1e3 * (time.thread_time() - start))
            taken[form].append(min(times))
    print(graph, length, {form: round(statistics.median(times), 2) for form, times in taken.items()}, flush=True)
    return {
        form: {
            "milliseconds": times,
            "difference": max(
                float(np.abs(ours - base).max() / np.abs(base).max())
                for ours, base in zip(outputs[form], outputs[BASE], strict=True)
            ),
        }
        for form, times in taken.items()
    }


def example(running: onnxruntime.InferenceSession, length: int, past: int = 16) -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(0)
    sizes = {"batch": 1, "prompt": length, "target": 1, "past": past}
    inputs = {}
    for port in running.get_inputs():
        shape = [sizes.get(axis, axis) for axis in port.shape]
        if port.name == "input_ids":
            inputs[port.name] = numbers.integers(3, 90, shape)
        elif port.name.endswith("mask"):
            inputs[port.name] = np.ones(shape, np.int64)
        else:
            inputs[port.name] = numbers.standard_normal(shape).astype(np.float32)
    return inputs


def table(results: dict) -> str:
    lines = ["# Fused operators in the ONNX graphs", ""]
    lines += [
        f"ONNX Runtime {onnxruntime.__version__}, torch {torch.__version__}, one thread. Processor time as a share of"
    ]
    lines += [f"`{BASE}`'s in the same round: the median, and in brackets the least and the largest.", ""]
    columns = [f"{graph} {length}" for graph, length in RUNS]
    lines += [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for variant, result in results.items():
        for form in (*FORMS, AGAIN):
            cells = []
            for column in columns:
                ours, base = (result["milliseconds"][column][name]["milliseconds"] for name in (form, BASE))
                ratios = [a / b for a, b in zip(ours, base, strict=True)]
                spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
                cells.append(f"{statistics.median(base):.1f} ms" if form == BASE else spread)
            lines.append(f"| {variant}, {form} | {' | '.join(cells)} |")
    lines += ["", "Fused operators after loading, encoder / decoder:", "", f"| | {' | '.join(FUSED)} |"]
    lines.append("|---" * (len(FUSED) + 1) + "|")
    for form, counts in results["fp32"]["operators"].items():
        cells = [" / ".join(str(counts[graph].get(name, 0)) for graph in ("encoder", "decoder")) for name in FUSED]
        lines.append(f"| {form} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
