"""Where two tokenizers have cut one text at the same place, so that what both predict next goes on from the same text.

Offsets of tokens are characters of the text as it was given, whatever a tokenizer made of it inside. Three traps:

- Post-processors of byte-level tokenizers trim white space off the offsets; they are taken before that.
- A character of several bytes may be cut in the middle, and each of its parts has the offsets of all of it; so has
  what a normaliser made of one character, or put in front of the text. Such a cut is no place in the text.
- Tokenizers of words drop the white space between them. A cut there is where the word before it ends.
"""

from collections import defaultdict
from collections.abc import Sequence

from tokenizers import Tokenizer


def offsets_encoder(tokenizer) -> Tokenizer:
    """What encodes as `tokenizer(text, add_special_tokens=False)` does, with the offsets of whole tokens.

    Raises:
        ValueError: the tokenizer is not a fast one, and so knows no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} knows no offsets of its tokens, by which two tokenisations of a text are "
            "aligned: load it with AutoTokenizer.from_pretrained(..., use_fast=True)."
        )
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.post_processor = None
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def text_boundaries(offsets: Sequence[tuple[int, int]], text: str) -> list[int]:
    """The character of `text` at which each of n tokens begins, and the end of the text: n + 1 numbers.

    That is where all tokens before it end, if all from it on begin there or behind white space; else -1.
    """
    starts = [len(text)]
    for start, _ in reversed(offsets):
        starts.append(min(start, starts[-1]))
    places, end = [], 0
    for start, (_, token_end) in zip(reversed(starts), offsets, strict=False):
        places.append(end if end <= start and not text[end:start].strip() else -1)
        end = max(end, token_end)
    return [*places, len(text)]


def same_text_so_far(ours: Sequence[int], theirs: Sequence[int]) -> list[int]:
    """For each of our boundaries the index of theirs at the same character, ascending; -1 if there is none.

    Of several at one character (a token without text stands between them) the last belongs to the last.
    """
    at = defaultdict(list)
    for index, place in enumerate(theirs):
        at[place].append(index)
    at[-1] = []
    matched = [at[place].pop() if at[place] else -1 for place in reversed(ours)]
    return matched[::-1]
