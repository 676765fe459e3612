"""Which ids of two tokenizers mean the same token, and a tokenizer cut down to the tokens that are needed."""

import json
from collections import Counter

import torch
from tokenizers import Tokenizer

from .prompts import distinct_pad_token, render_prompt, tokenizer_around


# An end of text or a beginning may be spelt in two ways and still be the same event.
_ROLES = ("eos_token", "bos_token")
_SPECIAL = (*_ROLES, "pad_token", "unk_token")


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
    kinds = _decoder_kinds(tokenizer), _decoder_kinds(other)
    if kinds[0] is not None and kinds[1] is not None and kinds[0] != kinds[1]:
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
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    return [step["type"] for step in _steps(spec["decoder"], "decoders")]


def trim_tokenizer(tokenizer, texts, size=None):
    """A byte-pair tokenizer with fewer tokens, under ids of its own: for a student.

    Without `size` it has the tokens that `texts` need and no others, and encodes `texts` into the same tokens. With
    `size` it has the tokens that are most frequent in `texts`, then, as far as there is room, those that the tokenizer
    itself learnt first; what is left out is written in smaller tokens. Any other text can be encoded too: single
    characters stay (so all bytes do), and so do added tokens, special ones among them.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): The teacher's.
        texts (`Iterable[str]`): What student and teacher will read and write, prompts and targets.
        size (`int`, *optional*): Most tokens to keep.

    Returns:
        `PreTrainedTokenizerFast`: With the special tokens and chat template of `tokenizer`.

    Raises:
        ValueError: the tokenizer is not a fast one, or not of byte pairs, or `size` is less than its characters and
            added tokens are.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str()) if getattr(tokenizer, "is_fast", False) else {"model": {}}
    model = spec["model"]
    if model.get("type") != "BPE":
        raise ValueError(
            f"{type(tokenizer).__name__} is of the kind {model.get('type', 'slow')!r}; only fast byte-pair tokenizers "
            "(BPE) can be trimmed. Train a small tokenizer and use vocab_policy='universal'."
        )
    vocabulary = model["vocab"]
    counts = Counter(token for text in texts for token in tokenizer.tokenize(text))
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    every = {**vocabulary, **{added["content"]: added["id"] for added in spec["added_tokens"]}}
    kept = {token for token in vocabulary if len(token) == 1 or token.startswith("<0x")}
    kept |= every.keys() & {model.get("unk_token"), *(added["content"] for added in spec["added_tokens"])}
    if size is None:
        kept |= every.keys() & counts.keys()
        for left, right in reversed(merges):  # what a kept token is merged from, however deep
            if left + right in kept:
                kept |= {left, right}
    elif size < len(kept):
        raise ValueError(
            f"a vocabulary of {size} tokens is too small: the characters and added tokens of this tokenizer are "
            f"{len(kept)} already. Give at least {len(kept)}."
        )
    else:
        _fill(kept, size, [token for token, _ in counts.most_common()], merges)
    ids = {token: new for new, token in enumerate(sorted(kept & every.keys(), key=every.get))}
    model["vocab"] = {token: ids[token] for token in vocabulary if token in ids}
    model["merges"] = [[left, right] for left, right in merges if {left, right, left + right} <= kept]
    for added in spec["added_tokens"]:
        added["id"] = ids[added["content"]]
    for step in _steps(spec["post_processor"], "processors"):
        for special in step.get("special_tokens", {}).values() if step["type"] == "TemplateProcessing" else ():
            special["ids"] = [ids[token] for token in special["tokens"]]
        for role in {"sep", "cls"} & step.keys():  # of RobertaProcessing and BertProcessing
            step[role][1] = ids[step[role][0]]
    return tokenizer_around(
        Tokenizer.from_str(json.dumps(spec)),
        tokenizer,
        {name: getattr(tokenizer, name) for name in _SPECIAL},
        chat_template=tokenizer.chat_template,
        padding_side=tokenizer.padding_side,
        clean_up_tokenization_spaces=False,
    )


def trim_to_rows(tokenizer, rows, size, prompt_template, prompt_date=None):
    """`trim_tokenizer` on the prompts and targets of rows; errors as of it and of `render_prompt`.

    Args:
        rows: with the columns `source` and `target`.
        prompt_template, prompt_date: as of `render_prompt`.
    """
    prompts = [render_prompt(tokenizer, source, prompt_template, prompt_date) for source in rows["source"]]
    return trim_tokenizer(tokenizer, [*prompts, *rows["target"]], size)


@torch.no_grad()
def trim_vocabulary(model, tokenizer, trimmed) -> None:
    """Keep the embedding rows of the tokens of `trimmed` alone, in its order, in place.

    The head too, and the special tokens of `model.config` and `model.generation_config` are `trimmed`'s.

    Args:
        model (`PreTrainedModel`): A decoder-only model or a student.
        tokenizer, trimmed (`PreTrainedTokenizerFast`): The model's, and one whose tokens are all in it, such as
            `trim_tokenizer` makes.

    Raises:
        ValueError: `trimmed` has tokens that `tokenizer` or the model's embedding lacks, or lacks the one from which
            the student's decoder starts.
    """
    their_ids = same_tokens(trimmed, tokenizer)
    size = 1 + max(trimmed.get_vocab().values())
    absent = [i for i in range(size) if i not in their_ids]
    if absent:
        raise ValueError(
            f"trimmed_tokenizer has {len(absent)} ids whose tokens the teacher does not have, the first of them "
            f"{absent[0]} ({trimmed.convert_ids_to_tokens(absent[0])!r}): make it with trim_tokenizer."
        )
    ids = {theirs: ours for ours, theirs in their_ids.items()}
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is not None and start not in ids:
        raise ValueError(
            f"trimmed_tokenizer lacks {tokenizer.convert_ids_to_tokens(start)!r}, from which the decoder starts: trim "
            "with texts that have the prompt in them."
        )
    rows = torch.tensor([their_ids[i] for i in range(size)], device=model.device)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    beyond = [theirs for theirs in rows.tolist() if theirs >= len(embedding.weight)]
    if beyond:
        raise ValueError(
            f"the tokenizer has the token {beyond[0]}, {tokenizer.convert_ids_to_tokens(beyond[0])!r}, and its model "
            f"has embeddings for 0 to {len(embedding.weight) - 1}: take the tokenizer that the model was trained "
            "with, or add rows with model.resize_token_embeddings and train them."
        )
    for layer in (embedding, head):
        layer.weight = torch.nn.Parameter(layer.weight[rows])
    embedding.num_embeddings = head.out_features = model.config.vocab_size = size
    model.tie_weights()
    pad = trimmed.convert_tokens_to_ids(distinct_pad_token(trimmed))
    # A generation config may name more tokens that end an answer.
    eos = model.generation_config.eos_token_id
    eos = model.config.eos_token_id if eos is None else eos
    if eos is not None:
        eos = [ids[i] for i in eos if i in ids] if isinstance(eos, list) else ids.get(eos)
    if embedding.padding_idx is not None:
        embedding.padding_idx = pad
    special = {
        "bos_token_id": ids.get(model.config.bos_token_id),
        "eos_token_id": eos,
        "pad_token_id": pad,
        **({} if start is None else {"decoder_start_token_id": ids[start]}),
    }
    for name, value in special.items():
        setattr(model.config, name, value)
        setattr(model.generation_config, name, value)
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        listed = getattr(model.generation_config, name, None)
        if listed is not None:
            setattr(model.generation_config, name, [ids[i] for i in listed if i in ids] or None)
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        forced = getattr(model.generation_config, name, None)
        if forced is not None:
            setattr(model.generation_config, name, ids.get(forced) if isinstance(forced, int) else None)


def _fill(kept: set, size: int, wanted: list, merges: list) -> None:
    """Add the tokens of `wanted`, then those of `merges` in their order, each with all that it is merged from."""
    parts: dict = {}
    for left, right in merges:
        parts.setdefault(left + right, []).append((left, right))
    for token in (*wanted, *parts):
        family, waiting = set(), [token]
        while waiting:
            member = waiting.pop()
            if member not in kept and member not in family and (member in parts or len(member) == 1):
                family.add(member)
                waiting += [part for pair in parts.get(member, ()) for part in pair]
        if len(kept) + len(family) <= size:
            kept |= family


def _steps(spec, name) -> list[dict]:
    """The steps of a processor or decoder, one or a sequence of them or none."""
    return [] if spec is None else spec.get(name, [spec])
