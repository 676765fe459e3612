"""The proof that an exported folder answers as PyTorch does: logits, tokens, cross-entropy on rows, time, size."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..metrics.timing import timed
from ..models.families import rope_limit
from ..models.rope_encdec.compat_rope_encdec import CACHE_FIELD
from .modules import in_float32
from .recipe import BOUNDS, Shapes, that_fit
from .runtime import ExportedForConditionalGeneration


BEAMS = 3
_ROUNDS = 5
_FARTHEST = 4096  # tokens of a prompt that costs no more than some gigabytes of attention scores
_LEAST_CE = 0.01  # nats per token: a rise is a share of PyTorch's, which may be next to nothing


def prove(
    folder: Path,
    model,
    rows: Sequence[Mapping[str, Any]],
    tokenizer=None,
    max_new_tokens: int = 32,
    update: Callable[[float, str], None] = lambda *_: None,
) -> dict[str, Any]:
    """Compare an exported folder with the model that it was made from.

    Args:
        model: the [`RopeEncDecForConditionalGeneration`]. It is compared in float32, in a copy where it is in another
            type, and stays as it is.
        rows: real rows, `inputs` (prompt token ids) and `labels` (target token ids with EOS), and `target` (text) for
            ROUGE-L; where the prompt has images also `pixel_values` `(I, 3, height, width)`.
        tokenizer: turns tokens into the texts that ROUGE-L compares. Without it, or without the package rouge-score,
            there is no ROUGE-L.

    Returns:
        `shapes` (a row for each shape of the grid: `max` and `mean` difference of logits, as a share of the largest),
        `logits` (the largest of them), `padding` (the largest difference that pads make), `tokens` (`greedy` and
        `beam`, shares of equal answers), `ce` and `agreement` on the rows, `rouge_l`, `seconds`, `megabytes`,
        `bounds`, and `failures`: sentences, empty if all is within. Of a student that reads images also
        `image_features`, their largest difference as a share of the largest.
    """
    exported = ExportedForConditionalGeneration.from_pretrained(folder)
    manifest = exported.manifest
    bounds = BOUNDS[manifest["variant"]]
    shapes = exported.graphs.shapes
    rows = that_fit(rows, shapes)
    with in_float32(model) as exact:
        update(0.0, "logits over a grid of shapes")
        grid = compare_logits(exported, exact, shapes)
        padding = compare_padding(exported, shapes)
        update(0.3, f"greedy and beam answers to {len(rows)} rows")
        tokens, rouge_l = compare_answers(exported, exact, rows, shapes, tokenizer, max_new_tokens)
        update(0.7, "cross-entropy on the rows")
        ce, agreement = compare_on_rows(exported, exact, rows)
        sees = "vision" in exported.graphs.graphs
        seen = {"image_features": compare_features(exported, exact, rows)} if sees else {}
        update(0.9, "time")
        seconds = {"pytorch": time_answer(exact, rows), "exported": time_answer(exported, rows)}
    report = {
        "target": manifest["target"],
        "variant": manifest["variant"],
        "shapes_taken": manifest["shapes"],
        "shapes": grid,
        "logits": float(np.max([case["max"] for case in grid])),  # unlike `max`, NaN if one is
        "padding": padding,
        **seen,
        "tokens": tokens,
        "ce": ce,
        "agreement": agreement,
        **({} if rouge_l is None else {"rouge_l": rouge_l}),
        "rows": len(rows),
        "seconds": seconds,
        "megabytes": {
            "exported": sum((folder / name).stat().st_size for name in manifest["files"]) / 1e6,
            "pytorch_fp32": sum(p.numel() for p in model.parameters()) * 4 / 1e6,
        },
        "bounds": dataclasses.asdict(bounds),
    }
    report["failures"] = _failures(report, bounds)
    update(1.0, "done")
    return report


def _failures(report: Mapping[str, Any], bounds) -> list[str]:
    """What is out of bounds. Written so that a NaN fails."""
    ce, tokens = report["ce"], report["tokens"]
    rise = (ce["exported"] - ce["pytorch"]) / max(ce["pytorch"], _LEAST_CE)
    features = report.get("image_features", 0.0)
    checks = {
        "not all logits are finite numbers": math.isfinite(report["logits"]),
        f"image features differ by {features:.2g} of the largest, bound {bounds.logits}": bounds.logits is None
        or features <= bounds.logits,
        f"logits differ by {report['logits']:.2g} of the largest, bound {bounds.logits}": bounds.logits is None
        or report["logits"] <= bounds.logits,
        f"pads change logits by {report['padding']:.2g} of the largest, bound {bounds.padding}": report["padding"]
        <= bounds.padding,
        f"cross-entropy rises by {rise:.2%}, bound {bounds.ce:.2%}": rise <= bounds.ce,
        f"top token agrees at {report['agreement']:.2%} of target tokens, bound {bounds.agreement:.2%}": (
            report["agreement"] >= bounds.agreement
        ),
        **{
            f"{tokens[way]:.2%} of {way} answers are equal, bound {bounds.tokens:.2%}": tokens[way] >= bounds.tokens
            for way in tokens
        },
    }
    return [sentence for sentence, holds in checks.items() if not holds]


@torch.no_grad()
def compare_logits(exported, model, shapes: Shapes) -> list[dict[str, Any]]:
    """Teacher-forced logits on random tokens over a grid of batch, prompt and target lengths, 1 included, with pads on
    either side, on one loaded model; with images none, one and two in a prompt, as far as it has room. Where RoPE
    changes at a length, also a prompt beyond it and a target that crosses it."""
    generator = torch.Generator().manual_seed(0)
    vision = exported.graphs.graphs.get("vision")
    each = vision.outputs[0].shape({"images": 1})[1] if vision else 0
    # Beyond what a sliding layer sees, as far as there are positions.
    window = min(getattr(model.config, "encoder_sliding_window", None) or 0, model.config.max_position_embeddings - 24)
    longest, slots = max(shapes.prompts or (max(48 + 2 * each, window + 8),)), shapes.targets or 16
    cases = []
    for batch, prompt, target in (
        (1, 1, 1),
        (1, longest, min(2, slots)),
        (2, min(7, longest), min(5, slots)),
        (3, 2, 1),
        *([(3, min(2 * each + 5, longest), 1)] if vision else []),
        *_across_the_limit(model.config, shapes),
    ):
        for side in ("none", "left", "right") if prompt > 1 and batch > 1 else ("none",):
            ids = torch.randint(model.config.vocab_size, (batch, prompt), generator=generator)
            labels = torch.randint(model.config.vocab_size, (batch, target), generator=generator)
            mask = torch.ones_like(ids)
            if side != "none":  # row i has i pads, as far as something is left
                for row in range(batch):
                    pads = min(row, prompt - 1)
                    mask[row, slice(0, pads) if side == "left" else slice(prompt - pads, None)] = 0
            inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": labels}
            shape = {"batch": batch, "prompt": prompt, "target": target, "pads": side}
            if vision:
                images = _put_images(ids, mask, model.config.image_token_id, each)
                shape["images"] = images
                if images:
                    size = vision.inputs[0].shape({"images": images})[1:]
                    inputs["pixel_values"] = torch.randn(images, *size, generator=generator)
            expected, found = model(**inputs).logits, exported(**inputs).logits
            difference = (found - expected).abs() / expected.abs().max()
            cases.append(shape | {"max": float(difference.max()), "mean": float(difference.mean())})
    return cases


def _across_the_limit(config, shapes: Shapes) -> list[tuple[int, int, int]]:
    """Batch, prompt and target of what is beyond the length at which RoPE changes: a prompt, then a target alone."""
    limit = rope_limit(config)
    if limit is None or limit > _FARTHEST:
        return []
    target_alone = (1, limit, 1) if config.cross_attention == "merged" else (1, 1, limit + 1)
    # Graphs of fixed sizes take a target token by token, each with the frequencies of its own length.
    return [
        (batch, prompt, target)
        for batch, prompt, target in ((1, limit + 8, 1), target_alone)
        if shapes.targets is None or (prompt <= max(shapes.prompts or ()) and target == 1)
    ]


@torch.no_grad()
def compare_padding(exported, shapes: Shapes) -> float:
    """The largest difference of an export's logits for prompts of random tokens that are padded in a batch, on either
    side, from its own for each prompt alone, as a share of the largest.

    What rounding of weights costs is in both, so that what pads do is seen in every variant.
    """
    generator, config = torch.Generator().manual_seed(0), exported.config
    longest, target = min(7, max(shapes.prompts or (7,))), min(3, shapes.targets or 3)
    lengths = [longest, max(longest - 3, 1), 1]
    ids = torch.randint(config.vocab_size, (len(lengths), longest), generator=generator)
    if (token := getattr(config, "image_token_id", None)) is not None:
        ids[ids == token] = (token + 1) % 2
    labels = torch.randint(config.vocab_size, (len(lengths), target), generator=generator)
    alone = [
        exported(
            input_ids=ids[row : row + 1, :length],
            attention_mask=torch.ones(1, length, dtype=torch.long),
            decoder_input_ids=labels[row : row + 1],
        ).logits
        for row, length in enumerate(lengths)
    ]
    expected, differences = torch.cat(alone), []
    for side in ("left", "right"):
        padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            columns = slice(longest - length, None) if side == "left" else slice(0, length)
            padded[row, columns], mask[row, columns] = ids[row, :length], 1
        found = exported(input_ids=padded, attention_mask=mask, decoder_input_ids=labels).logits
        differences.append(float((found - expected).abs().max() / expected.abs().max()))
    return float(np.max(differences))


def _put_images(ids: torch.Tensor, mask: torch.Tensor, token: int, each: int) -> int:
    """Turn real tokens of prompts `(B, S)`, in place, into image tokens, `each` for an image. The first row gets the
    most images, the last none, unless it is alone. Returns how many there are."""
    ids[ids == token] = (token + 1) % 2
    images = 0
    for row, real in enumerate(mask.bool()):
        wanted = min(max(len(ids) - 1 - row, len(ids) == 1), int(real.sum()) // each)
        ids[row, real.nonzero()[:, 0][: wanted * each]] = token
        images += wanted
    return images


@torch.no_grad()
def compare_features(exported, model, rows: Sequence[Mapping]) -> float:
    """The largest difference of image features, as a share of the largest, over the images of all rows.

    Raises:
        ValueError: there are none.
    """
    differences = []
    for pixels in (row["pixel_values"] for row in rows if row.get("pixel_values") is not None):
        expected = model.get_image_features(torch.as_tensor(pixels))
        found = torch.from_numpy(exported.graphs.image_features(pixels))
        differences.append(float((found - expected).abs().max() / expected.abs().max()))
    if not differences:
        raise ValueError(f"none of {len(rows)} rows has an image: give rows with pixel_values, or nothing is proven")
    return float(np.max(differences))


def _prompt(row: Mapping) -> dict[str, torch.Tensor]:
    """What a model is given of a row's prompt, as a batch of one."""
    ids = torch.tensor([row["inputs"]])
    images = {} if row.get("pixel_values") is None else {"pixel_values": torch.as_tensor(row["pixel_values"])}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}


@torch.no_grad()
def compare_answers(
    exported, model, rows: Sequence[Mapping], shapes: Shapes, tokenizer, max_new_tokens: int
) -> tuple[dict[str, float], dict[str, float] | None]:
    """Shares of rows whose greedy and beam answers are equal to the last token, and ROUGE-L of the greedy ones."""
    options = {"max_new_tokens": min(max_new_tokens, shapes.targets or max_new_tokens), "do_sample": False}
    options["return_dict_in_generate"] = False
    equal: dict[str, list[bool]] = {"greedy": [], "beam": []}
    texts: dict[str, list[str]] = {"pytorch": [], "exported": []}
    for row in rows:
        for way, beams in (("greedy", 1), ("beam", BEAMS)):
            expected, found = (
                one.generate(**_prompt(row), num_beams=beams, **options)[0].tolist() for one in (model, exported)
            )
            equal[way].append(expected == found)
            if way == "greedy" and tokenizer is not None:
                for name, answer in (("pytorch", expected), ("exported", found)):
                    texts[name].append(tokenizer.decode(answer, skip_special_tokens=True).strip())
    tokens = {way: float(np.mean(same)) for way, same in equal.items()}
    if tokenizer is None or importlib.util.find_spec("rouge_score") is None:
        return tokens, None
    from ..metrics.texts import rouge_l

    return tokens, {
        name: float(np.mean([rouge_l(answer, row["target"]) for answer, row in zip(answers, rows, strict=True)]))
        for name, answers in texts.items()
    }


@torch.no_grad()
def compare_on_rows(exported, model, rows: Sequence[Mapping]) -> tuple[dict[str, float], float]:
    """Cross-entropy of the targets, nats per token; the share of target tokens whose likeliest token is the same."""
    sums, same, count = {"pytorch": 0.0, "exported": 0.0}, 0, 0
    for row in rows:
        labels = torch.tensor([row["labels"]])
        inputs = {**_prompt(row), "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels)}
        logits = {"pytorch": model(**inputs).logits[0].double(), "exported": exported(**inputs).logits[0].double()}
        for name, of_one in logits.items():
            sums[name] += float(torch.nn.functional.cross_entropy(of_one, labels[0], reduction="sum"))
        same += int((logits["pytorch"].argmax(-1) == logits["exported"].argmax(-1)).sum())
        count += labels.shape[1]
    return {name: total / count for name, total in sums.items()}, same / count


@torch.no_grad()
def time_answer(model, rows: Sequence[Mapping]) -> dict[str, float]:
    """Seconds to the first token and for each further one: batch 1, longest prompt of the rows, median of rounds."""
    prompt = _prompt(max(rows, key=lambda row: len(row["inputs"])))
    mask = prompt["attention_mask"]
    start = torch.tensor([[model.config.decoder_start_token_id]])

    def steps() -> Iterator[list[int]]:
        # A student that was trained with checkpointed gradients says use_cache=False in its config.
        fixed = {"attention_mask": mask, "encoder_outputs": model.get_encoder()(**prompt), "use_cache": True}
        outputs = model(**fixed, decoder_input_ids=start)
        yield outputs.logits[:, -1].argmax(-1).tolist()
        outputs = model(**fixed, decoder_input_ids=start, past_key_values=outputs[CACHE_FIELD])
        yield outputs.logits[:, -1].argmax(-1).tolist()

    rounds = [timed(steps())[1] for _ in range(_ROUNDS + 1)][1:]  # the first warms up
    return {
        "first_token": statistics.median(first for first, _ in rounds),
        "token": statistics.median(both - first for first, both in rounds),
        "prompt": mask.shape[1],
    }
