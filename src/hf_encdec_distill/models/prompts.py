"""What a decoder-only teacher reads before the target, and a tokenizer that has it built in.

A teacher sees `prompt + target`. The prompt is the source inside a template of the user's, or inside the tokenizer's
own chat template, or the source as it is. A `merged` student reads the same prompt: its encoder all tokens but the
last, its decoder the last one as start token.
"""

import json
import logging

import transformers
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing


logger = logging.getLogger(__name__)

PLACEHOLDER = "{source}"

# Sources that show whether a template can be built into the tokenizer: the seams are where tokens could merge.
_PROBES = ("def f(x):\n    return x + 1", "The quick brown fox.", "a", "42 ways, 3.5%")

# Tokens that pad elsewhere, or are reserved and never trained, in the order of preference.
_PAD_CANDIDATES = (
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<|finetune_right_pad_id|>",
    "<|endoftext|>",
    "<unk>",
    "<|reserved_special_token_0|>",
)


class PreTrainedTokenizerFast(transformers.PreTrainedTokenizerFast):
    """What a student's tokenizer is, so that either major version of transformers loads what the other one saved.

    A tokenizer writes the name of its class into its folder. In 5.x upstream's class is an alias of
    `TokenizersBackend`, which 4.57 has never heard of; this name both know.
    """

    can_save_slow_tokenizer = False  # there is none, and 5.x would drop "Fast" from the name


def encode_prompt(tokenizer, source, prompt_template=None, max_length=None) -> list[int]:
    """Token ids that the teacher reads before the target.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The teacher's.
        source (`str` or `list[dict]`): Source text, or chat messages up to and without the answer.
        prompt_template (`str`, *optional*): Text with `{source}` in it; without one, the tokenizer's chat template
            (`add_generation_prompt=True`), and without that the source as it is.
        max_length (`int`, *optional*): Most tokens of the whole prompt; what is cut is the end of the source (of the
            last message's content), never the template.

    Returns:
        `list[int]`: The ids, with exactly one BOS in front where the tokenizer puts one there.

    Raises:
        ValueError: if the template lacks `{source}`, messages come with a prompt template or without a chat template,
            or `max_length` leaves no token for the source.
    """
    ids = encode_rendered(tokenizer, render_prompt(tokenizer, source, prompt_template))
    if max_length is None or len(ids) <= max_length:
        return ids
    text = source if isinstance(source, str) else source[-1]["content"]
    source_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    keep = len(source_ids) - (len(ids) - max_length)
    while keep > 0:
        shorter = _first_tokens(tokenizer, text, source_ids, keep)
        cut = shorter if isinstance(source, str) else [*source[:-1], {**source[-1], "content": shorter}]
        ids = encode_rendered(tokenizer, render_prompt(tokenizer, cut, prompt_template))
        if len(ids) <= max_length:
            return ids
        keep -= len(ids) - max_length
    raise ValueError(
        f"max_length={max_length} leaves no token for the source: the prompt around it alone takes about "
        f"{len(ids) - max(keep, 0)} tokens. Raise max_length or shorten prompt_template."
    )


def prompt_start_token_id(tokenizer, prompt_template=None) -> int | None:
    """The constant last token of the teacher's prompt, from which a `merged` student starts; `None` without one."""
    if prompt_template is None and not tokenizer.chat_template:
        return None
    last = {encode_rendered(tokenizer, render_prompt(tokenizer, probe, prompt_template))[-1] for probe in _PROBES}
    return last.pop() if len(last) == 1 else None


def distinct_pad_token(tokenizer) -> str | None:
    """A pad token that is not an end of sequence, where the vocabulary has one; else the tokenizer's own."""
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        return tokenizer.pad_token
    vocabulary = tokenizer.get_vocab()
    for token in _PAD_CANDIDATES:
        if token in vocabulary and token not in (tokenizer.eos_token, tokenizer.bos_token):
            return token
    return tokenizer.pad_token or tokenizer.eos_token


def student_tokenizer(tokenizer, prompt_template=None, cross_attention="merged") -> PreTrainedTokenizerFast:
    """The student's tokenizer: the teacher's vocabulary, a pad token of its own, padding on the right.

    For a `merged` student the prompt template is its post-processor: `student_tokenizer(source)["input_ids"]` is
    `encode_prompt(...)` without the last token, also when truncated, so that nobody who loads the student has to know
    the template. Where tokens merge across the seam (some SentencePiece vocabularies) that cannot be; then the
    tokenizer encodes the source alone, a warning says so, and prompts come from [`encode_prompt`].

    Args:
        tokenizer (`PreTrainedTokenizerFast`): The teacher's.
        prompt_template (`str`, *optional*): As in [`encode_prompt`].
        cross_attention (`"merged"` or `"separate"`): Kind of the student; a `separate` one reads the bare source.

    Raises:
        ValueError: if the tokenizer is not a fast one.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer; load the teacher's with "
            "AutoTokenizer.from_pretrained(...), use_fast=True."
        )
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token")}
    special["pad_token"] = distinct_pad_token(tokenizer)

    def wrap(backend):
        return _around(
            backend,
            tokenizer,
            special,
            padding_side="right",
            truncation_side="right",
            clean_up_tokenization_spaces=False,
        )

    backend = _backend_of(tokenizer)
    if cross_attention != "merged" or (prompt_template is None and not tokenizer.chat_template):
        return wrap(backend)

    before, _, after = render_prompt(tokenizer, PLACEHOLDER, prompt_template).partition(PLACEHOLDER)
    prefix, suffix = encode_rendered(tokenizer, before), tokenizer(after, add_special_tokens=False)["input_ids"][:-1]
    pieces = [("<prompt_prefix>", prefix), ("<prompt_suffix>", suffix)]
    with_prompt = Tokenizer.from_str(backend.to_str())
    with_prompt.post_processor = TemplateProcessing(
        single=[*(["<prompt_prefix>"] if prefix else []), "$A", *(["<prompt_suffix>"] if suffix else [])],
        special_tokens=[
            {"id": name, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)} for name, ids in pieces if ids
        ],
    )
    student = wrap(with_prompt)
    for probe in _PROBES:
        if student(probe)["input_ids"] != encode_prompt(tokenizer, probe, prompt_template)[:-1]:
            logger.warning(
                "The prompt template cannot be built into this tokenizer: tokens merge across its seams. The "
                "student's tokenizer encodes the bare source; make prompts with "
                "hf_encdec_distill.models.prompts.encode_prompt."
            )
            return wrap(backend)
    return student


def in_a_class_of_both_versions(tokenizer):
    """`tokenizer`, which either major version of transformers loads where this one has saved it; a slow one as it is.

    Others are saved under the name of their class, and 5.x has classes that 4.57 lacks, and builds some anew from
    vocabulary and merges where 4.57 takes tokenizer.json. Of this class both take it as it is.
    """
    if not getattr(tokenizer, "is_fast", False):
        return tokenizer
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if not isinstance(token, list)}
    return _around(
        _backend_of(tokenizer),
        tokenizer,
        special,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        chat_template=tokenizer.chat_template,
    )


def _backend_of(tokenizer) -> Tokenizer:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return backend


def _around(backend, tokenizer, special, **options) -> PreTrainedTokenizerFast:
    """`backend` with the special tokens `special`, by name, and all else of `tokenizer` that `options` leave open."""
    pre_tokenizer = json.loads(backend.to_str())["pre_tokenizer"] or {}
    if "add_prefix_space" in pre_tokenizer:  # transformers < 5.0 would set it to False
        options["add_prefix_space"] = pre_tokenizer["add_prefix_space"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        model_input_names=[
            "input_ids",
            "attention_mask",
        ],  # 4.57 adds token_type_ids, which decoder-only models reject
        **{name: value for name, value in special.items() if value is not None},
        **options,
    )


def render_prompt(tokenizer, source, prompt_template=None) -> str:
    """The text of the teacher's prompt; arguments and errors as of [`encode_prompt`]."""
    if prompt_template is not None:
        if PLACEHOLDER not in prompt_template:
            raise ValueError(f"prompt_template={prompt_template!r} has no {PLACEHOLDER} for the source; put it in.")
        if not isinstance(source, str):
            raise ValueError("Chat messages bring their own template; leave prompt_template out, or pass source text.")
        return prompt_template.replace(PLACEHOLDER, source)
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": source}] if isinstance(source, str) else source
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if not isinstance(source, str):
        raise ValueError(
            f"{type(tokenizer).__name__} has no chat template to render messages with; set tokenizer.chat_template or "
            "pass source text and prompt_template."
        )
    return source


def encode_rendered(tokenizer, text) -> list[int]:
    """Ids of what [`render_prompt`] gave, with exactly one BOS in front where the tokenizer puts one there."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos] and tokenizer("a")["input_ids"][:1] == [bos]:
        return [bos, *ids]
    return ids


def _first_tokens(tokenizer, text, ids, count) -> str:
    """The text of the first `count` tokens, as it stands in the source where the tokenizer knows offsets."""
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text[: offsets[count - 1][1]]
    return tokenizer.decode(ids[:count])
