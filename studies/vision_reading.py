"""Does a student read print, and name drawings? Distilled from a teacher that is told the words, on labels, and blind.

    python studies/vision_reading.py lines --output docs/studies/vision
    apt-get install openclipart-png openclipart-svg
    python studies/vision_reading.py clipart --output docs/studies/vision

`lines`: words of real documentation, drawn in the fonts that matplotlib carries; the student spells them, a character
per token. It is judged by its character error rate on documentation that it was not trained on, in the same fonts and
in others. `clipart`: the titles of Open Clip Art's drawings. It is judged by ROUGE-L and by whole titles, on drawings
that it was not trained on, whose titles it was or was not.
"""

import argparse
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from nltk import edit_distance
from PIL import Image, ImageDraw, ImageFont
from transformers import set_seed

from hf_encdec_distill.bench.latency import machine_description
from hf_encdec_distill.data import load_python_docstrings
from hf_encdec_distill.metrics import rouge_l
from hf_encdec_distill.metrics.significance import interval, mean


sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "vision"))

from students import STUDENTS, Lesson, Picture, Task  # noqa: E402


LINES = Task(size=(28, 168), vision_feature_layer=4, pixel_shuffle=1, examples=("t h e _ r e d",), most_tokens=16)
CLIPART = Task(
    size=(112, 112),
    vision_feature_layer=12,
    pixel_shuffle=2,
    examples=("the red house", "hammer", "old man with dog", "sheep"),
    most_tokens=16,
)
CHARACTERS = 12
FONTS = ("Sans", "Sans-Bold", "SansMono", "SansMono-Bold", "Serif", "Serif-Bold")
OTHER_FONTS = ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic")
MOST_OF_A_TITLE = 20
MOST_BYTES = 200_000  # of a drawing; some are posters
HELD_OUT = 300


class Split(NamedTuple):
    train: list[Picture]
    held_out: dict[str, list[Picture]]


# --- lines of print ---


def spelled(text: str) -> str:
    return " ".join(text.replace(" ", "_"))


def pieces(sentences: Sequence[str], rng: random.Random) -> Iterator[str]:
    """One or more whole words in a row, of at most `CHARACTERS` together."""
    while True:
        words = rng.choice(sentences).split()
        first = rng.randrange(len(words))
        text = words[first]
        for word in words[first + 1 :]:
            if len(text) + 1 + len(word) > CHARACTERS:
                break
            text += f" {word}"
        if 2 < len(text) <= CHARACTERS and re.fullmatch(r"[!-^`-~ ]+", text):  # ASCII without "_", which is a space
            yield text


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    name = f"DejaVu{name}" if name in FONTS else name
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")), size)


def line(text: str, fonts: Sequence[str], rng: random.Random) -> Picture:
    """A line of print: font, size, place, ink, paper and angle vary."""
    height, width = LINES.size
    name, size = rng.choice(fonts), rng.randint(16, 22)
    while font(name, size).getlength(text) > width - 6:
        size -= 1
    paper, ink = rng.randint(170, 255), rng.randint(0, 90)
    image = Image.new("L", (width, height), paper)
    room = max(width - 4 - font(name, size).getlength(text), 0)
    place = (2 + rng.uniform(0, min(room, 20)), height / 2 + rng.uniform(-2, 2))
    ImageDraw.Draw(image).text(place, text, ink, font(name, size), anchor="lm")
    image = image.rotate(rng.uniform(-1, 1), Image.Resampling.BICUBIC, fillcolor=paper)
    return Picture(image.convert("RGB"), spelled(text))


def lines(seed: int, texts: int, pictures: int) -> Split:
    rng = random.Random(seed)
    rows = load_python_docstrings("stdlib")
    read = pieces(rows["train"]["target"], rng)
    seen = dict.fromkeys(next(read) for _ in range(texts))
    train = [line(rng.choice(list(seen)), FONTS, rng) for _ in range(pictures)]
    unread = (text for text in pieces(rows["test"]["target"], rng) if text not in seen)
    new = [next(unread) for _ in range(HELD_OUT)]
    named = {"other lines": FONTS, "other lines in other fonts": OTHER_FONTS}
    return Split(train, {name: [line(text, fonts, rng) for text in new] for name, fonts in named.items()})


def judge_lines(answers: Sequence[str], pictures: Sequence[Picture]) -> dict[str, dict[str, float]]:
    """The character error rate, and the share of lines without an error, with 95 % bootstrap intervals over lines."""
    wanted = [picture.words.split(" ") for picture in pictures]
    errors = np.array([edit_distance(answer.split(" "), line) for answer, line in zip(answers, wanted)], dtype=float)
    lengths = np.array([len(line) for line in wanted], dtype=float)
    return {
        "character error rate": interval(mean(errors, lengths)),
        "lines without error": interval(mean((errors == 0).astype(float), np.ones(len(errors)))),
    }


# --- titles of drawings ---


def title(svg: Path) -> str | None:
    """One to four words in lower case, if that is what the drawing is called; a number behind them is left out."""
    found = re.search(r"<dc:title[^>]*>(.*?)</dc:title>", svg.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    words = "" if found is None else re.sub(r"[\s_]*\d*$", "", " ".join(found[1].split()).lower())
    return words if re.fullmatch(r"[a-z']{2,}( [a-z']+){0,3}", words) else None


def clipart(folder: Path, seed: int) -> Split:
    drawings = [
        (png, title(svg))
        for png in sorted((folder / "png").rglob("*.png"))
        # The cards are kept for a study of card games.
        if "cards" not in png.parts
        and (svg := folder / "svg" / png.relative_to(folder / "png").with_suffix(".svg")).exists()
    ]
    drawings = [(png, words) for png, words in drawings if words and png.stat().st_size < MOST_BYTES]
    # What more drawings are called names the collection.
    often = {words for words, count in Counter(words for _, words in drawings).items() if count > MOST_OF_A_TITLE}
    drawings = [(png, words) for png, words in drawings if words not in often]
    random.Random(seed).shuffle(drawings)
    pictures = [Picture(on_white(png), words) for png, words in drawings]
    held_out, train = pictures[: 2 * HELD_OUT], pictures[2 * HELD_OUT :]
    known = {picture.words for picture in train}
    named = {"other drawings of known titles": True, "drawings of other titles": False}
    return Split(
        train, {name: [one for one in held_out if (one.words in known) is there] for name, there in named.items()}
    )


def on_white(png: Path) -> Image.Image:
    image = Image.open(png).convert("RGBA")
    image.thumbnail((2 * CLIPART.size[1], 2 * CLIPART.size[0]))
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image)
    return ground.convert("RGB")


def judge_clipart(answers: Sequence[str], pictures: Sequence[Picture]) -> dict[str, dict[str, float]]:
    """ROUGE-L and the share of whole titles, with 95 % bootstrap intervals over drawings."""
    every = np.ones(len(pictures))
    overlap = np.array([rouge_l(answer, picture.words) for answer, picture in zip(answers, pictures)])
    exact = np.array([answer == picture.words for answer, picture in zip(answers, pictures)], dtype=float)
    return {"ROUGE-L": interval(mean(overlap, every)), "whole titles": interval(mean(exact, every))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("lines", "clipart"))
    parser.add_argument("--output", type=Path, required=True, help="folder for TASK-SEED.json")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/vision-reading"), help="for records (default: %(default)s)"
    )
    parser.add_argument("--students", nargs="+", choices=tuple(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--steps", type=int, default=1500, help="of a student; a blind one makes a fifth of them")
    parser.add_argument(
        "--texts", type=int, default=3000, help="that the teacher reads, of `lines` (default: %(default)s)"
    )
    parser.add_argument("--pictures", type=int, default=12_000, help="to train on, of `lines` (default: %(default)s)")
    parser.add_argument("--drawings", type=Path, default=Path("/usr/share/openclipart"), help="(default: %(default)s)")
    parser.add_argument("--peak", type=float, default=5e-4, help="largest learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    machine = machine_description()
    set_seed(args.seed)
    is_lines = args.task == "lines"
    split = lines(args.seed, args.texts, args.pictures) if is_lines else clipart(args.drawings, args.seed)
    judge = judge_lines if is_lines else judge_clipart
    lesson = Lesson(LINES if is_lines else CLIPART, split.train, args.work / f"{args.task}-{args.seed}", args.seed)
    found = {}
    for name in args.students:
        blind = name == "blind"
        begin = time.monotonic()
        steps = lesson.learn(name, args.peak, steps=args.steps // 5 if blind else args.steps)
        found[name] = {"steps": steps, "minutes": (time.monotonic() - begin) / 60}
        for held_out, pictures in split.held_out.items():
            answers = lesson.answers(pictures, blank=blind)
            found[name][held_out] = judge(answers, pictures)
            found[name][held_out]["examples"] = [
                [picture.words, answer] for picture, answer in zip(pictures, answers)
            ][:8]
        print(name, json.dumps(found[name]))
    args.output.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine, "seed": args.seed, "texts": len({picture.words for picture in split.train})}
    result |= {"pictures": len(split.train), "peak": args.peak, "students": found}
    (args.output / f"{args.task}-{args.seed}.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
