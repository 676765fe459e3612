"""Playing cards and their names, drawn with the fonts that matplotlib carries (DejaVu)."""

import random
from functools import cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from students import Picture


RANKS = {
    "ace": "A",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
    "jack": "J",
    "queen": "Q",
    "king": "K",
}
SUITS = {"spades": "♠", "hearts": "♥", "diamonds": "♦", "clubs": "♣"}
FONTS = ("Sans", "Sans-Bold", "SansMono", "SansMono-Bold", "Serif", "Serif-Bold")
_FINER = 4  # drawn larger and made smaller, for smooth edges


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVu{name}.ttf")), size)


def card(rank: str, suit: str, rng: random.Random, size: tuple[int, int]) -> Picture:
    """A playing card on a table: font, ink, paper, table, size, place and angle vary.

    `size`: height and width in pixels.
    """
    height, width = (_FINER * side for side in size)
    table = Image.new("RGB", (width, height), tuple(rng.randint(20, 150) for _ in range(3)))
    tall = height - 2 * _FINER * rng.randint(2, 7)
    wide = round(0.72 * tall)
    face = Image.new("RGBA", (wide, tall))
    draw = ImageDraw.Draw(face)
    paper = rng.randint(235, 255)
    draw.rounded_rectangle(
        (0, 0, wide - 1, tall - 1), tall // 14, (paper, paper, paper, 255), (90, 90, 90, 255), _FINER
    )
    ink = (rng.randint(170, 220), 20, 30, 255) if suit in ("hearts", "diamonds") else (20, 20, 20, 255)
    index = _font(rng.choice(FONTS), round(0.27 * tall))
    draw.text((0.27 * wide, 0.2 * tall), RANKS[rank], font=index, fill=ink, anchor="mm")
    draw.text((0.58 * wide, 0.62 * tall), SUITS[suit], font=_font("Sans", tall // 2), fill=ink, anchor="mm")
    face = face.rotate(rng.uniform(-6, 6), resample=Image.Resampling.BICUBIC, expand=True)
    left, top = ((whole - part) // 2 + rng.randint(-2, 2) * _FINER for whole, part in zip(table.size, face.size))
    table.paste(face, (left, top), face)
    return Picture(table.resize((size[1], size[0]), Image.Resampling.BICUBIC), f"{rank} of {suit}")


def draw_cards(count: int, seed: int, size: tuple[int, int]) -> list[Picture]:
    """All 52 cards in turn."""
    rng = random.Random(seed)
    names = [(rank, suit) for rank in RANKS for suit in SUITS]
    return [card(*names[number % len(names)], rng, size) for number in range(count)]
