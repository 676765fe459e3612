"""Tokenizers beside the byte-level BPE of conftest.py: one under other ids, and two of other kinds."""

import json

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.decoders import Metaspace
from tokenizers.decoders import WordPiece as WordPieceDecoder
from transformers import PreTrainedTokenizerFast


TEXTS = [
    "Return the sum of two numbers.",
    "The quick brown fox jumps over lazy dogs.",
    "Zoé lit 日本 in a café.",
    "Two spaces and a line",
    "añb fix 1⁄2 !\n\n Café",
] * 3
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


def renumbered(tokenizer, ids):
    """The same BPE with id `ids[i]` in place of i; chat template and roles as they are."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["model"]["vocab"] = {token: ids[i] for token, i in spec["model"]["vocab"].items()}
    for added in spec["added_tokens"]:
        added["id"] = ids[added["id"]]
    for special in (spec["post_processor"] or {}).get("special_tokens", {}).values():
        special["ids"] = [ids[i] for i in special["ids"]]
    return _rebuilt(tokenizer, spec)


def merging_blanks(tokenizer):
    """The same BPE and some tokens in which a blank and what is beside it are one, as a large vocabulary has them."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    for pair in (("Ġ", "Ċ"), ("Ċ", "Ċ"), ("Ġ", "x"), ("Ġ", "T"), ("Ġ", "S")):
        spec["model"]["vocab"]["".join(pair)] = len(spec["model"]["vocab"])
        spec["model"]["merges"].append(list(pair))
    return _rebuilt(tokenizer, spec)


def _rebuilt(tokenizer, spec):
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False,
        **{role: getattr(tokenizer, role) for role in ROLES if getattr(tokenizer, role) is not None},
    )


def _wrap(tokenizer):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[SEP]", unk_token="[UNK]", bos_token="[CLS]"
    )


def wordpiece(vocab_size=150):
    """As BERT's: lower case, no accents, no white space."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = WordPieceDecoder()
    special = ["[PAD]", "[UNK]", "[SEP]", "[CLS]"]
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _wrap(tokenizer)


def unigram(vocab_size=120):
    """As T5's: NFKC, a mark for white space, also in front of the text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = Metaspace()
    special = ["[PAD]", "[UNK]", "[SEP]", "[CLS]"]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=special, unk_token="[UNK]", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _wrap(tokenizer)
