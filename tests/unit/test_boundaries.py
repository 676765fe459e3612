"""Where two tokenizers cut a text at the same place: by hand, and by what each decodes of what stands before."""

import unicodedata

import pytest
from tokenizer_toys import unigram, wordpiece
from tokenizers import processors

from hf_encdec_distill.distillation.alignment.boundaries import offsets_encoder, same_text_so_far, text_boundaries


TEXTS = [
    "Return the sum.",
    "Zoé lit 日本 in a café.",
    "  two  spaces\n\nand a line \n",
    "añb ﬁx ½ 👍🏽!",
    "Cafe\u0301 e\u0301t",  # the accents are characters of their own
    "",
]


@pytest.fixture
def bpe(make_bpe_tokenizer):
    return make_bpe_tokenizer()


def encoded(tokenizer, text):
    return offsets_encoder(tokenizer).encode(text, add_special_tokens=False)


def test_by_hand():
    # "né x": é is cut into two parts of the whole; a word tokenizer drops the space.
    bytes_of_it = [(0, 1), (1, 2), (1, 2), (2, 4)]
    assert text_boundaries(bytes_of_it, "né x") == [0, 1, -1, 2, 4]
    words = [(0, 2), (3, 4)]
    assert text_boundaries(words, "né x") == [0, 2, 4]
    assert same_text_so_far([0, 1, -1, 2, 4], [0, 2, 4]) == [0, -1, -1, 1, 2]
    assert same_text_so_far([0, 2, 4], [0, 1, -1, 2, 4]) == [0, 3, 4]
    # A character that was dropped, and is none of white space: who knows on which side of the cut it is.
    assert text_boundaries([(0, 1), (2, 3)], "a\u0301b") == [0, -1, 3]
    # A token without text in front.
    assert text_boundaries([(0, 0), (0, 2)], "ab") == [0, 0, 2]
    assert same_text_so_far([0, 0, 2], [0, 2]) == [-1, 0, 1]
    assert same_text_so_far([0, 2], [0, 0, 2]) == [1, 2]
    assert text_boundaries([], "") == [0]


def test_a_space_belongs_to_the_token_that_has_it(bpe):
    """Byte-level post-processors trim it off the offsets: a newline at the end of a token would be the next one's."""
    bpe.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    text = "a  b\nc"
    trimmed = bpe(text, return_offsets_mapping=True)["offset_mapping"]
    whole = encoded(bpe, text)
    assert trimmed != whole.offsets and whole.ids == bpe(text)["input_ids"]
    assert [text[a:b] for a, b in whole.offsets] == bpe.batch_decode([[i] for i in whole.ids])
    assert bpe(text, return_offsets_mapping=True)["offset_mapping"] == trimmed  # the tokenizer itself is as it was


@pytest.mark.parametrize("text", TEXTS)
def test_with_itself_every_cut_is_shared(bpe, text):
    for tokenizer in (bpe, wordpiece(), unigram()):
        offsets = encoded(tokenizer, text).offsets
        cuts = text_boundaries(offsets, text)
        matched = same_text_so_far(cuts, cuts)
        assert matched == [t if place >= 0 else -1 for t, place in enumerate(cuts)]


def same_text(one, other):
    """White space and case aside, and without accents, which a tokenizer may take off."""

    def plain(text):
        text = unicodedata.normalize("NFKD", "".join(text.split()).lower())
        return "".join(c for c in text if not unicodedata.combining(c))

    return plain(one) == plain(other)


@pytest.mark.parametrize("text", [text for text in TEXTS if "👍" not in text])
@pytest.mark.parametrize("other", [wordpiece, unigram])
def test_both_have_said_the_same_so_far(bpe, other, text):
    """By another way than offsets: what the tokens before decode to."""
    other = other()
    ours, theirs = encoded(bpe, text), encoded(other, text)
    assert other.unk_token_id not in theirs.ids
    matched = same_text_so_far(*(text_boundaries(e.offsets, text) for e in (ours, theirs)))
    assert len(matched) == len(ours.ids) + 1 and matched[-1] == len(theirs.ids)
    compared = [(t, s) for t, s in enumerate(matched) if s >= 0]
    assert [s for _, s in compared] == sorted({s for _, s in compared})
    for t, s in compared:
        assert same_text(bpe.decode(ours.ids[:t]), other.decode(theirs.ids[:s])), (t, s)
    # And nothing is left out: the end of every word that another one follows is among them.
    words = {
        len(text[:i].rstrip()) for i, c in enumerate(text) if c.isspace() and text[:i].strip() and text[i:].strip()
    }
    found = {text_boundaries(ours.offsets, text)[t] for t, _ in compared}
    assert "\u0301" in text or words <= found


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ValueError, match="object knows no offsets"):
        offsets_encoder(object())
