"""Which ids of two tokenizers mean the same token."""

import json


# An end of text or a beginning may be spelt in two ways and still be the same event.
_ROLES = ("eos_token", "bos_token")


def same_tokens(tokenizer, other) -> dict[int, int]:
    """Ids of `tokenizer` -> ids of `other` that stand for the same token, one to one.

    Tokens are the same if they are written the same. EOS and BOS are too if the other tokenizer has no token written
    like it and no other one already stands for its EOS or BOS.

    Args:
        tokenizer, other: anything with `get_vocab()` and `eos_token`; usually one is cut out of the other.

    Raises:
        ValueError: the tokenizers decode in different ways ("the" of a WordPiece tokenizer begins a word, "the" of a
            byte-level one goes on with it), or have no token in common.
    """
    kinds = [_decoder_kinds(one) for one in (tokenizer, other)]
    if None not in kinds and kinds[0] != kinds[1]:
        raise ValueError(
            f"tokens of the two tokenizers are not the same although some are written the same: one decodes with "
            f"{' + '.join(kinds[0]) or 'nothing'}, the other with {' + '.join(kinds[1]) or 'nothing'}."
        )
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    pairs = {i: theirs[token] for token, i in ours.items() if token in theirs}
    if not pairs:
        raise ValueError("the two tokenizers have no token in common.")
    for role in _ROLES:
        token, counterpart = getattr(tokenizer, role, None), getattr(other, role, None)
        if token in ours and token not in theirs and theirs.get(counterpart, -1) not in {-1, *pairs.values()}:
            pairs[ours[token]] = theirs[counterpart]
    return pairs


def _decoder_kinds(tokenizer) -> list[str] | None:
    """The steps in which tokens become text; None where that cannot be looked up."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]
    if decoder is None:
        return []
    return [step["type"] for step in decoder.get("decoders", [decoder])]
