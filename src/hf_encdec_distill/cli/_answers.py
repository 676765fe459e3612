"""Answers of a student and its teacher to one text, as they are written: tokens, times, and where the two agree."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from transformers.generation.streamers import BaseStreamer

from ..distillation.alignment.vocabularies import SharedVocabulary
from ..distillation.teachers.targets import end_tokens
from ..evaluation.fidelity import token_calibration
from ..evaluation.scoring import encode_rows, read_by_encoder, target_logits


@dataclass
class Answer:
    """Token ids so far, EOS among them, and for each the seconds since the model was given the prompt."""

    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float | None:
        """After the first token, whose time is the prompt's; None before there are two."""
        return (len(self.times) - 1) / (self.times[-1] - self.times[0]) if len(self.times) > 1 else None


@dataclass(frozen=True)
class Choice:
    """What a teacher puts first at a place of an answer, how likely that is to it, and whether the answer has it."""

    token_id: int
    probability: float
    agrees: bool


@dataclass(frozen=True)
class Question:
    """What is read of a text: `prompt` by a decoder-only model, `inputs` by an encoder; `tokens` it would be uncut;
    `images` are their pixels."""

    prompt: list[int]
    inputs: list[int]
    tokens: int
    images: dict[str, torch.Tensor] = field(default_factory=dict)


class Reader:
    """Texts to token ids for a student and, where there is one, its teacher.

    Args:
        tokenizer, config: the student's.
        teacher, teacher_tokenizer: the decoder-only model, or None.
        prompt_template: what the teacher reads; a merged student has it built in.
        max_prompt: most tokens of the whole prompt.

    Attributes:
        vocabulary: `SharedVocabulary`; None without a teacher, or if it has another tokenizer.
        mismatch: why the two tokenizers do not compare, or None.
    """

    def __init__(self, tokenizer, config, teacher, teacher_tokenizer, prompt_template: str | None, max_prompt: int):
        self.tokenizer, self.config, self.max_prompt = tokenizer, config, max_prompt
        self.teacher_tokenizer, self.prompt_template = teacher_tokenizer, prompt_template
        self.vocabulary = self.mismatch = None
        if teacher is not None:
            sizes = config.vocab_size, teacher.config.vocab_size
            try:
                self.vocabulary = SharedVocabulary.between(*sizes, tokenizer, teacher_tokenizer)
            except ValueError as error:
                self.mismatch = str(error)

    def read(self, text: str, most: int | None = None) -> Question:
        """
        Args:
            most: tokens that the student's backend takes, if it has a limit.
        """
        most = self.max_prompt if most is None else min(most, self.max_prompt)
        uncut = len(self.tokenizer(text)["input_ids"])
        pair = {"source": text, "target": ""}
        day = getattr(self.config, "prompt_date", None)
        [row] = encode_rows([pair], self.teacher_tokenizer or self.tokenizer, self.prompt_template, most, 0, day)
        of_teacher = row["prompt"]
        if self.mismatch:
            [row] = encode_rows([pair], self.tokenizer, self.prompt_template, most, 0, day)
        read_by_encoder([row], self.tokenizer, self.config, most)
        prompt = of_teacher if self.mismatch else row["prompt"]
        return Question(prompt, row["inputs"], uncut)


class ImageReader:
    """Texts with images to what a student reads that has a processor; no teacher is beside it.

    Args:
        max_prompt: most tokens of a text, those of the images not counted.
    """

    vocabulary = mismatch = None

    def __init__(self, processor, max_prompt: int):
        self.processor, self.max_prompt = processor, max_prompt

    def read(self, text: str, most: int | None = None, images: Sequence[bytes] = ()) -> Question:
        """
        Args:
            most: tokens that the student's backend takes, if it has a limit.
            text: with the image token where an image is to be seen; where it has none, all stand in front.
            images: files, in the order of the tokens.

        Raises:
            ValueError: an image cannot be read, or there are not as many as image tokens.
        """
        token = self.processor.image_token
        text = text if token in text else token * len(images) + text
        read = self.processor(images=list(images), text=text, return_tensors="pt")
        [whole] = ids = read["input_ids"]
        of_images = int((whole == self.processor.image_token_id).sum())
        limit = self.max_prompt + of_images if most is None else min(most, self.max_prompt + of_images)
        if len(whole) > limit:
            cut = {"truncation": True, "max_length": limit}
            ids = self.processor(images=list(images), text=text, return_tensors="pt", **cut)["input_ids"]
        pixels = {"pixel_values": read["pixel_values"]} if images else {}
        return Question([], ids[0].tolist(), len(whole), pixels)


class _Tokens(BaseStreamer):
    """Ids and the moments they came, from the thread that generates. What `generate` puts first is the prompt."""

    def __init__(self):
        self.arrived: queue.SimpleQueue[tuple[int, float] | None] = queue.SimpleQueue()
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.arrived.put((int(value), time.perf_counter()))
        self._prompt_seen = True

    def end(self) -> None:
        pass  # the end of the thread is the end, with an error too


def stream(
    model,
    ids: Sequence[int],
    tokenizer,
    max_new_tokens: int,
    images: Mapping[str, torch.Tensor] | None = None,
    **sampling,
) -> Generator[Answer, None, None]:
    """`model.generate` as it goes, greedily by default: the same answer again and again, with what has come since.

    Whoever stops asking stops the model.

    Args:
        model: an encoder-decoder, exported or not, or a decoder-only model.
        ids: what its encoder reads, or the whole prompt.
        images: what else its encoder reads, as in [`Question`].
        sampling: options of `generate` that make it draw tokens.
    """
    tokens, stopped = _Tokens(), threading.Event()
    prompt = torch.tensor([ids], device=model.device)
    answer = Answer()
    with ThreadPoolExecutor(max_workers=1) as worker:
        start = time.perf_counter()
        generation = worker.submit(
            model.generate,
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            **{name: values.to(model.device) for name, values in (images or {}).items()},
            max_new_tokens=max_new_tokens,
            num_beams=1,
            num_return_sequences=1,
            **{"do_sample": False, **sampling},
            eos_token_id=end_tokens(model, tokenizer) or None,
            pad_token_id=tokenizer.pad_token_id,
            tokenizer=tokenizer,  # for stop_strings of the generation config
            streamer=tokens,
            stopping_criteria=[lambda *_: stopped.is_set()],
        )
        generation.add_done_callback(lambda _: tokens.arrived.put(None))
        try:
            for token_id, moment in iter(tokens.arrived.get, None):
                answer.ids.append(token_id)
                answer.times.append(moment - start)
                if tokens.arrived.empty():
                    yield answer
        finally:
            stopped.set()
    generation.result()  # raises what went wrong
    yield answer


@torch.inference_mode()
def teacher_choices(
    teacher, prompt: Sequence[int], answer: Sequence[int], vocabulary: SharedVocabulary
) -> list[Choice]:
    """What the teacher puts first at each place of an answer, having read the prompt and the answer up to there.

    Raises:
        ValueError: the answer has an id that the teacher has not.
    """
    vocabulary.check(torch.tensor(answer), torch.tensor(prompt))
    logits, labels = target_logits(teacher, [{"prompt": list(prompt), "labels": list(answer)}])
    logits = vocabulary.restrict_teacher(logits)
    told = token_calibration(logits, labels)
    columns = (logits.argmax(-1), told["confidence"], told["correct"] == 1)
    return [Choice(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]


def token_texts(tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; nothing, where it ends inside a character, which then comes with the next."""
    texts, before = [], ""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        whole = text if count == len(ids) else text.rstrip("\N{REPLACEMENT CHARACTER}")
        texts.append(whole[len(before) :])
        before = whole if len(whole) > len(before) else before
    return texts
