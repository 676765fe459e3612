"""What an encoder saves where images are read: a student against a decoder-only model of the same parts.

    python studies/vision_cost.py --output docs/studies/vision

Both have DINOv2-small, a projector and layers of SmolLM2-135M's sizes: transformers' LLaVA all 30, the student 5 in
its encoder and 6 in its decoder. A third is LLaVA with as many layers as the student. Weights are random: this is
about time. Rounds are interleaved, medians and quartiles are over rounds, and ratios are of the same round.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import Dinov2Config, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from hf_encdec_distill import RopeEncDecForImageTextToText, RopeEncDecVisionConfig
from hf_encdec_distill.bench.latency import machine_description, quartiles


WORDS = 16  # of the question, behind the image
PATCH = 14
TEXT = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
IMAGE_TOKEN = 3


def tower(pixels: int) -> Dinov2Config:
    return Dinov2Config(hidden_size=384, num_attention_heads=6, patch_size=PATCH, image_size=pixels)


def llava(layers: int, pixels: int) -> LlavaForConditionalGeneration:
    text = LlamaConfig(**TEXT, num_hidden_layers=layers, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = LlavaConfig(
        vision_config=tower(pixels),
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config).eval()


def student(encoder: int, decoder: int, pixels: int) -> RopeEncDecForImageTextToText:
    config = RopeEncDecVisionConfig(
        **TEXT,
        encoder_num_hidden_layers=encoder,
        decoder_num_hidden_layers=decoder,
        cross_attention="merged",
        vision_config=tower(pixels),
        vision_final_norm=True,
        image_token_id=IMAGE_TOKEN,
    )
    return RopeEncDecForImageTextToText(config).eval()


@torch.inference_mode()
def timed(model, inputs, tokens: int) -> dict[str, float]:
    """Milliseconds: to the first token, and for each further one."""
    times = {}
    for length in (1, tokens):
        start = time.perf_counter()
        model.generate(**inputs, max_new_tokens=length, min_new_tokens=length, do_sample=False)
        times[length] = 1e3 * (time.perf_counter() - start)
    return {"first": times[1], "step": (times[tokens] - times[1]) / (tokens - 1), "request": times[tokens]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for cost.json")
    parser.add_argument("--pixels", type=int, nargs="+", default=[224, 448], help="of an image's side")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, nargs=3, default=[30, 5, 6], help="teacher, encoder, decoder")
    args = parser.parse_args()
    machine = machine_description()  # before the load that the rounds are
    whole, encoder, decoder = args.layers
    rows = []
    for pixels in args.pixels:
        features = (pixels // PATCH) ** 2
        inputs = {
            "input_ids": torch.cat(
                [torch.full((1, features), IMAGE_TOKEN), torch.arange(10, 10 + WORDS)[None]], dim=1
            ),
            "attention_mask": torch.ones(1, features + WORDS, dtype=torch.long),
            "pixel_values": torch.randn(1, 3, pixels, pixels),
        }
        models = {
            f"LLaVA, {whole} layers": llava(whole, pixels),
            f"LLaVA, {encoder + decoder} layers": llava(encoder + decoder, pixels),
            f"student, {encoder} + {decoder} layers": student(encoder, decoder, pixels),
        }
        rounds = {name: [] for name in models}
        for turn in tqdm(range(args.rounds + 1), desc=f"{pixels} pixels"):
            for name, model in models.items():
                measured = timed(model, inputs, args.tokens)
                if turn:  # the first is a warm-up
                    rounds[name].append(measured)
        teacher = rounds[f"LLaVA, {whole} layers"]
        for name, measured in rounds.items():
            row = {"model": name, "pixels": pixels, "image_tokens": features, "answer_tokens": args.tokens}
            row["parameters"] = sum(weight.numel() for weight in models[name].parameters())
            for what in ("first", "step", "request"):
                row[f"{what}_ms"] = quartiles([one[what] for one in measured])
                row[f"{what}_ratio"] = quartiles([one[what] / of[what] for one, of in zip(measured, teacher)])
            rows.append(row)
    args.output.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine, "rounds": args.rounds, "rows": rows}
    (args.output / "cost.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    for row in rows:
        print(
            row["pixels"],
            row["model"],
            *(f"{row[f'{what}_ms']['value']:.0f}" for what in ("first", "step", "request")),
        )


if __name__ == "__main__":
    main()
