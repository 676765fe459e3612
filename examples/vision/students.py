"""Students that learn to write down what a picture shows, from a teacher that cannot see, but is told in words.

The teacher is a language model: it reads the words in its prompt and writes them down. The student is shown a picture
of them, and learns from the teacher's distribution of each token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Model

from hf_encdec_distill import (
    DistillationTrainer,
    DistillationTrainingArguments,
    RopeEncDecForConditionalGeneration,
    RopeEncDecForImageTextToText,
    RopeEncDecVisionProcessor,
)
from hf_encdec_distill.cli.quickstart.timed_training import TimeShare, train
from hf_encdec_distill.data import fetch_builtin_teacher, fetch_builtin_vision_tower
from hf_encdec_distill.devices import precision_arguments, working_dtype
from hf_encdec_distill.distillation import LiveTeacher, capture
from hf_encdec_distill.models.vocabulary import trim_tokenizer


STUDENTS = {
    "distilled": "distilled from the teacher that reads the words",
    "labels": "from the labels alone",
    "blind": "distilled, shown blank pictures",
}
BATCH_SIZE = 32
LAYERS = 2  # of the encoder and of the decoder
MOST_STEPS = 100_000
MOST_TO_FIT = 256  # texts


class Picture(NamedTuple):
    image: Image.Image
    words: str


@dataclass(frozen=True)
class Task:
    """
    Args:
        size: height and width of a picture in pixels.
        vision_feature_layer: of the tower. Strokes and shapes are in the lower layers, which also cost less.
        pixel_shuffle: so many patches squared are a token.
        examples: of what is written down. A small model that is shown none would rather talk about it; of one it
            takes over the first word.
        most_tokens: of an answer.
    """

    size: tuple[int, int]
    vision_feature_layer: int
    pixel_shuffle: int
    examples: tuple[str, ...]
    most_tokens: int


class Lesson:
    """A teacher's record of `pictures`, and a student and processor that learn from it, each time from the start.

    Args:
        task: see `Task`.
        pictures: to train on. The teacher reads each text once, however many pictures show it.
        output: folder of the record and of training.
        seed: of the order of rows.
        teacher, vision_tower: folders or Hub ids of a causal language model and a DINOv2; None are the built-in ones.
    """

    def __init__(
        self,
        task: Task,
        pictures: Sequence[Picture],
        output: Path,
        seed: int,
        teacher: str | None = None,
        vision_tower: str | None = None,
    ):
        self.task, self.output, self.seed = task, output, seed
        folder = teacher or fetch_builtin_teacher()
        lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tower = Dinov2Model.from_pretrained(vision_tower or fetch_builtin_vision_tower())
        words = sorted({picture.words for picture in pictures})
        told = {text: self._told(text, tokenizer) for text in words}
        self.student, self.processor = _build(lm, tokenizer, tower, told, task)
        self.rows = _rows(pictures, told, self.processor, tokenizer)
        _record(lm, tokenizer, self.processor.tokenizer, self.rows, self._records)
        self._start = {name: weight.clone() for name, weight in self.student.state_dict().items()}

    def __str__(self) -> str:
        tower = sum(weight.numel() for weight in self.student.model.encoder.vision_tower.parameters())
        others = sum(weight.numel() for weight in self.student.parameters()) - tower
        return (
            f"{tower / 1e6:.1f} million parameters of the vision tower, {others / 1e6:.1f} million others; "
            f"{self.processor.tokens_of_tile} tokens for a picture"
        )

    @property
    def _records(self) -> Path:
        return self.output / "records"

    def _told(self, words: str, tokenizer) -> str:
        """The teacher's prompt."""
        say = "Say: {}"
        turns = [turn for example in self.task.examples for turn in (say.format(example), example)]
        turns.append(say.format(words))
        messages = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(turns)]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def learn(self, name: str, peak: float, seconds: float = float("inf"), steps: int = MOST_STEPS) -> int:
        """Train one of `STUDENTS`, from the start; returns the steps made.

        Args:
            peak: largest learning rate.
            seconds, steps: whichever ends first.
        """
        self.student.load_state_dict(self._start)
        rows = self.rows
        if name == "blind":
            blank = np.zeros_like(rows[0]["pixel_values"])
            rows = [{**row, "pixel_values": blank} for row in rows]
        arguments = DistillationTrainingArguments(
            output_dir=str(self.output / f"training-{name}"),
            distill_weight=0.0 if name == "labels" else 0.5,
            vocab_policy="id_map",
            per_device_train_batch_size=BATCH_SIZE,
            max_steps=steps,
            max_grad_norm=1.0,
            logging_steps=10,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            report_to="none",
            seed=self.seed,
            **precision_arguments(),
        )
        trainer = DistillationTrainer(
            self.student,
            arguments,
            teacher=str(self._records),
            train_dataset=rows,
            processing_class=self.processor.tokenizer,
        )
        with tqdm(total=100, desc=name, bar_format="{desc} {percentage:3.0f}% {postfix}") as bar:

            def update(fraction: float, detail: str) -> None:
                bar.set_postfix_str(detail, refresh=False)
                bar.update(100 * fraction - bar.n)

            return train(trainer, TimeShare(seconds, steps, peak, update))["steps"]

    @torch.inference_mode()
    def answers(self, pictures: Sequence[Picture], blank: bool) -> list[str]:
        """Greedy ones."""
        self.student.eval()
        found: list[str] = []
        for first in tqdm(range(0, len(pictures), BATCH_SIZE), desc="answers", delay=5):
            images = [picture.image for picture in pictures[first : first + BATCH_SIZE]]
            text = [self.processor.image_token] * len(images)
            inputs = self.processor(images=images, text=text, return_tensors="pt")
            if blank:
                inputs["pixel_values"].zero_()
            ids = self.student.generate(**inputs, max_new_tokens=self.task.most_tokens, do_sample=False)
            found += [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]
        return found


def _build(teacher, tokenizer, tower, told: dict[str, str], task: Task):
    """The student and its processor: a text student that is fitted to write down what it is told, then eyes."""
    text_student = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher,
        encoder_num_hidden_layers=LAYERS,
        decoder_num_hidden_layers=LAYERS,
        layer_selection="even",
        encoder_attention="bidirectional",
        calibration=[(prompt, text) for text, prompt in list(told.items())[:MOST_TO_FIT]],
        tokenizer=tokenizer,
        trimmed_tokenizer=trim_tokenizer(tokenizer, [*told, *told.values()]),
        prompt_template="{source}",
    )
    print(f"fitted to the texts as words: {text_student.healing}")
    student = RopeEncDecForImageTextToText.from_parts(
        text_student,
        tower,
        vision_feature_layer=task.vision_feature_layer,
        projector_pixel_shuffle=task.pixel_shuffle,
    )
    # It has learnt from 142 million pictures, and these are few.
    student.model.encoder.vision_tower.requires_grad_(False)
    return student, RopeEncDecVisionProcessor.for_model(student, size=task.size)


def _rows(pictures: Sequence[Picture], told: dict[str, str], processor, tokenizer) -> list[dict]:
    """Rows for `DistillationTrainer`: the student reads the picture, the teacher the words."""
    rows = []
    for picture in tqdm(pictures, desc="rows", delay=5):
        inputs = processor(images=picture.image, text=processor.image_token)
        labels = processor.tokenizer(picture.words, add_special_tokens=False)["input_ids"]
        read = tokenizer(told[picture.words], add_special_tokens=False)["input_ids"]
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


def _record(teacher, tokenizer, student_tokenizer, rows: Sequence[dict], folder: Path) -> None:
    texts = {tuple(row["teacher_input_ids"]): row for row in rows}
    without_pictures = [{name: row[name] for name in row if name != "pixel_values"} for row in texts.values()]
    capture(
        LiveTeacher(teacher, str(working_dtype()).removeprefix("torch.")),
        without_pictures,
        folder,
        tokenizer,
        batch_size=BATCH_SIZE,
        student_tokenizer=student_tokenizer,
        vocab_policy="id_map",
    )
