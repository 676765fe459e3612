"""What a decoder-only teacher reads before the target, and a tokenizer that has it built in.

A teacher sees `prompt + target`. The prompt is the source inside a template of the user's, or inside the tokenizer's
own chat template, or the source as it is. A `merged` student reads the same prompt: its encoder all tokens but the
last, its decoder the last one as start token.

What stands before the source, the source, and what stands behind it are encoded one by one, so that no token reaches
across a seam whatever the source ends in: that is what a tokenizer with the template built in does too. Where parts
give another text than the whole (a SentencePiece vocabulary puts a space in front of each), and for chat messages, the
whole text is encoded.

A chat template may name the day (`strftime_now`). The prompt of a student, a cache and a run is then rendered for one
day, their `prompt_date`, whatever day it is.
"""

import copy
import functools
import json
import logging
from datetime import date, datetime, time

import transformers
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from ..files import one_line
from .families import is_merged


logger = logging.getLogger(__name__)

PLACEHOLDER = "{source}"

# Sources that show whether parts of a prompt can be encoded one by one, and whether tokens would merge in the whole.
_PROBES = ("def f(x):\n    return x + 1", "The quick brown fox.", "a", "42 ways, 3.5%")

_DIRECTIVES = "aAwdbBmyYHIMSpfjUWcxXGuVeDFTR"  # of strftime

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


def check_limit(name, tokens) -> None:
    """Raises ValueError where a limit of length, `tokens`, is below 1; None is no limit."""
    if tokens is not None and tokens < 1:
        raise ValueError(f"{name}={tokens} is out of range; it has to be at least 1, or None for no cut.")


def check_template(prompt_template) -> None:
    """Raises ValueError for a template without a place for the source."""
    if PLACEHOLDER not in prompt_template:
        raise ValueError(f"prompt_template={prompt_template!r} has no {PLACEHOLDER} for the source; put it in.")


def encode_prompt(tokenizer, source, prompt_template=None, max_length=None, prompt_date=None) -> list[int]:
    """Token ids that the teacher reads before the target.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The teacher's.
        source (`str` or `list[dict]`): Source text, or chat messages up to and without the answer.
        prompt_template (`str`, *optional*): Text with `{source}` in it; without one, the tokenizer's chat template
            (`add_generation_prompt=True`), and without that the source as it is.
        max_length (`int`, *optional*): Most tokens of the whole prompt; what is cut is the end of the source (of the
            last message's content), never the template.
        prompt_date (`str`, *optional*): As in [`render_prompt`].

    Returns:
        `list[int]`: The ids, with exactly one BOS in front where the tokenizer puts one there.

    Raises:
        ValueError: if the template lacks `{source}`, messages come with a prompt template or without a chat template,
            the chat template fails, or `max_length` is below 1 or leaves no token for the source.
    """
    check_limit("max_length", max_length)
    parts = _around_source(tokenizer, prompt_template, prompt_date) if isinstance(source, str) else None
    if parts is not None:
        source_ids = tokenizer(source, add_special_tokens=False)["input_ids"]
        around = sum(map(len, parts))
        if max_length is not None and around + len(source_ids) > max_length:
            if max_length <= around:
                raise no_room(max_length, around)
            source_ids = source_ids[: max_length - around]
        return [*parts[0], *source_ids, *parts[1]]
    ids = encode_rendered(tokenizer, render_prompt(tokenizer, source, prompt_template, prompt_date))
    if max_length is None or len(ids) <= max_length:
        return ids
    text = source if isinstance(source, str) else source[-1]["content"]
    source_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    keep = len(source_ids) - (len(ids) - max_length)
    while keep > 0:
        shorter = _first_tokens(tokenizer, text, source_ids, keep)
        cut = shorter if isinstance(source, str) else [*source[:-1], {**source[-1], "content": shorter}]
        ids = encode_rendered(tokenizer, render_prompt(tokenizer, cut, prompt_template, prompt_date))
        if len(ids) <= max_length:
            return ids
        keep -= len(ids) - max_length
    raise no_room(max_length, len(ids) - max(keep, 0))


def prompt_start_token_id(tokenizer, prompt_template=None) -> int | None:
    """The constant last token of the teacher's prompt, from which a `merged` student starts; `None` without one."""
    if prompt_template is None and not tokenizer.chat_template:
        return None
    parts = _around_source(tokenizer, prompt_template)
    if parts is not None:
        return parts[1][-1] if parts[1] else None
    last = {encode_rendered(tokenizer, render_prompt(tokenizer, probe, prompt_template))[-1] for probe in _PROBES}
    return last.pop() if len(last) == 1 else None


def frozen_prompt_date(tokenizer, prompt_template=None, prompt_date=None) -> str | None:
    """The day that prompts are rendered for: `prompt_date`, today without one; `None` if no prompt names a day.

    Args:
        tokenizer, prompt_template: As in [`encode_prompt`]; without a tokenizer no prompt is rendered.
        prompt_date (`str`, *optional*): `YYYY-MM-DD`.

    Raises:
        ValueError: if `prompt_date` is no such date.
    """
    day = date.today() if prompt_date is None else _parse_date(prompt_date)
    if prompt_template is not None or "strftime_now" not in str(getattr(tokenizer, "chat_template", None)):
        return None
    first, other = (render_prompt(tokenizer, PLACEHOLDER, None, day) for day in ("2001-02-03", "2014-11-28"))
    return None if first == other else day.isoformat()


def distinct_pad_token(tokenizer, vocab_size=None) -> str | None:
    """A pad token that is not an end of sequence, where the vocabulary has one; else the tokenizer's own.

    With `vocab_size`, that of a model, one for which it has an embedding: tokens that were added to a tokenizer alone
    have none.
    """
    vocabulary = {token: i for token, i in tokenizer.get_vocab().items() if vocab_size is None or i < vocab_size}
    own = tokenizer.pad_token if tokenizer.pad_token in vocabulary else None
    if own is not None and own != tokenizer.eos_token:
        return own
    for token in _PAD_CANDIDATES:
        if token in vocabulary and token not in (tokenizer.eos_token, tokenizer.bos_token):
            return token
    return own or tokenizer.eos_token


def with_pad_token(tokenizer):
    """The tokenizer, or a copy that has a pad token where it has none, as those of Llama and Mistral."""
    if tokenizer.pad_token is not None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = distinct_pad_token(tokenizer)
    return tokenizer


def student_tokenizer(
    tokenizer, prompt_template=None, cross_attention="merged", prompt_date=None, vocab_size=None
) -> PreTrainedTokenizerFast:
    """The student's tokenizer: the teacher's vocabulary, a pad token of its own, padding on the right.

    For a `merged` student the prompt template is its post-processor: `student_tokenizer(source)["input_ids"]` is
    `encode_prompt(...)` without the last token, also when truncated, so that nobody who loads the student has to know
    the template. Where the parts of a prompt cannot be encoded one by one (some SentencePiece vocabularies) the
    tokenizer encodes the source alone, a warning says so, and prompts come from [`encode_prompt`].

    Args:
        tokenizer (`PreTrainedTokenizerFast`): The teacher's.
        prompt_template (`str`, *optional*): As in [`encode_prompt`].
        cross_attention (`"merged"` or `"separate"`): Kind of the student; a `separate` one reads the bare source.
        prompt_date (`str`, *optional*): As in [`render_prompt`].
        vocab_size (`int`, *optional*): As in [`distinct_pad_token`].

    Raises:
        ValueError: if the tokenizer is not a fast one.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer; load the teacher's with "
            "AutoTokenizer.from_pretrained(...), use_fast=True."
        )
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token")}
    special["pad_token"] = distinct_pad_token(tokenizer, vocab_size)

    def wrap(backend):
        return tokenizer_around(
            backend,
            tokenizer,
            special,
            padding_side="right",
            truncation_side="right",
            clean_up_tokenization_spaces=False,
        )

    backend = _backend_of(tokenizer)
    if cross_attention == "merged" and not reads_bare_source(tokenizer):
        # It puts EOS or [SEP] behind a text, and a teacher's prompt goes on.
        _put_around(backend, tokenizer, encode_rendered(tokenizer, ""), [])
    if cross_attention != "merged" or (prompt_template is None and not tokenizer.chat_template):
        return wrap(backend)

    parts = _around_source(tokenizer, prompt_template, prompt_date)
    if parts is None:
        logger.warning(
            "The prompt template cannot be built into this tokenizer: it encodes the parts of a text otherwise than "
            "the whole. The student's tokenizer encodes the bare source; make prompts with "
            "hf_encdec_distill.models.prompts.encode_prompt."
        )
        return wrap(backend)
    for probe in _PROBES:
        whole = encode_rendered(tokenizer, render_prompt(tokenizer, probe, prompt_template, prompt_date))
        if whole != encode_prompt(tokenizer, probe, prompt_template, prompt_date=prompt_date):
            logger.warning(
                "Ordinary text would join what the prompt template has beside {source}, a blank perhaps, with the "
                "words of the source. Template and source are encoded one by one, for teacher and student alike; with "
                "line breaks around {source} the teacher reads the tokens that it knows."
            )
            break
    _put_around(backend, tokenizer, parts[0], parts[1][:-1])
    return wrap(backend)


def _put_around(backend, tokenizer, prefix, suffix) -> None:
    """Have `backend` put these ids of `tokenizer` around a text, and no others."""
    pieces = [("<prompt_prefix>", prefix), ("<prompt_suffix>", suffix)]
    backend.post_processor = TemplateProcessing(
        single=[*(["<prompt_prefix>"] if prefix else []), "$A", *(["<prompt_suffix>"] if suffix else [])],
        special_tokens=[
            {"id": name, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)} for name, ids in pieces if ids
        ],
    )


def with_prompt_as_chat_template(tokenizer, prompt_template=None):
    """A decoder-only student's tokenizer: `tokenizer`, or a copy whose chat template is `prompt_template`.

    Then `encode_prompt` and `apply_chat_template` make the student's prompts without being told the template.
    """
    if prompt_template is None:
        return tokenizer
    check_template(prompt_template)
    bos = tokenizer.bos_token_id
    begin = "{{ bos_token }}" if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else ""
    # Jinja reads string literals as Python does.
    prompt = f"{prompt_template!r}.replace({PLACEHOLDER!r}, message['content'])"
    student = copy.deepcopy(tokenizer)
    student.chat_template = (
        f"{begin}{{% for message in messages %}}"
        "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
        f"{{% else %}}{{{{ {prompt} }}}}{{% endif %}}{{% endfor %}}"
    )
    return student


def reads_bare_source(tokenizer) -> bool:
    """Whether it encodes a text with nothing around it but BOS: no prompt template is built in."""
    bare = tokenizer(_PROBES[0], add_special_tokens=False)["input_ids"]
    return tokenizer(_PROBES[0])["input_ids"] in (bare, [tokenizer.bos_token_id, *bare])


def lacks_prompt(tokenizer, config) -> bool:
    """Whether a merged student was made with a prompt that its tokenizer cannot hold, and reads the source alone.

    Its `config` names the last token of that prompt, or BOS or EOS where there was none.
    """
    eos = config.eos_token_id
    starts_a_text = config.decoder_start_token_id in (config.bos_token_id, *(eos if isinstance(eos, list) else [eos]))
    if not is_merged(config) or starts_a_text or not reads_bare_source(tokenizer):
        return False
    return _around_source(tokenizer, f"{PLACEHOLDER}\n#") is None


def warn_of_lacking_prompt(name, tokenizer, config) -> None:
    """Says of the student `name` that it is given texts without the prompt that it was made with, where it is so."""
    if lacks_prompt(tokenizer, config):
        logger.warning(
            "The tokenizer of %s cannot hold the prompt that it was made with: it answers the bare text, which it was "
            "not trained for. Make its input with hf_encdec_distill.models.prompts.encode_prompt, without the last "
            "token.",
            name,
        )


def in_a_class_of_both_versions(tokenizer):
    """`tokenizer`, which either major version of transformers loads where this one has saved it; a slow one as it is.

    Others are saved under the name of their class, and 5.x has classes that 4.57 lacks, and builds some again from
    vocabulary and merges where 4.57 takes tokenizer.json. Of this class both take it as it is.
    """
    if not getattr(tokenizer, "is_fast", False):
        return tokenizer
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if not isinstance(token, list)}
    return tokenizer_around(
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


def tokenizer_around(backend, tokenizer, special, **options) -> PreTrainedTokenizerFast:
    """`backend` with the special tokens `special`, by name, and all else of `tokenizer` that `options` leave open."""
    pre_tokenizer = json.loads(backend.to_str())["pre_tokenizer"] or {}
    if "add_prefix_space" in pre_tokenizer:  # transformers < 5.0 would set it to False
        options["add_prefix_space"] = pre_tokenizer["add_prefix_space"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        # 4.57 adds token_type_ids, which decoder-only models reject.
        model_input_names=["input_ids", "attention_mask"],
        **{name: value for name, value in special.items() if value is not None},
        **options,
    )


def render_prompt(tokenizer, source, prompt_template=None, prompt_date=None) -> str:
    """The text of the teacher's prompt; arguments and errors as of [`encode_prompt`].

    Args:
        prompt_date (`str`, *optional*): `YYYY-MM-DD`, the day that a chat template is told it is; by default today.
    """
    if prompt_template is not None:
        check_template(prompt_template)
        if not isinstance(source, str):
            raise ValueError("Chat messages bring their own template; leave prompt_template out, or pass source text.")
        return prompt_template.replace(PLACEHOLDER, source)
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": source}] if isinstance(source, str) else source
        template = tokenizer.get_chat_template()
        if prompt_date is not None and "strftime_now" in template:
            template = _on_day(prompt_date) + template
        try:
            return tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except ImportError:
            raise
        except Exception as error:  # of a program in another language, which may fail in any way
            raise ValueError(
                f"the chat template of the tokenizer {tokenizer.name_or_path!r} does not render these messages: "
                f"{one_line(error)}. Mend it, or give a prompt_template with {PLACEHOLDER} in it (--prompt-template)"
            ) from error
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


def _around_source(tokenizer, prompt_template, prompt_date=None) -> tuple[list[int], list[int]] | None:
    """Ids in front of the source and behind it; `None` where these and the source's own are not those of one text."""
    text = render_prompt(tokenizer, PLACEHOLDER, prompt_template, prompt_date)
    before, found, after = text.partition(PLACEHOLDER)
    if not found or PLACEHOLDER in after:
        return None
    prefix, suffix = encode_rendered(tokenizer, before), tokenizer(after, add_special_tokens=False)["input_ids"]
    probe = _PROBES[1]
    in_parts = [*prefix, *tokenizer(probe, add_special_tokens=False)["input_ids"], *suffix]
    whole = encode_rendered(tokenizer, before + probe + after)
    texts = {tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (in_parts, whole)}
    return (prefix, suffix) if len(texts) == 1 else None


def no_room(max_length, around) -> ValueError:
    """Of a prompt of `max_length` tokens that has none for the source beside the `around` of its template."""
    return ValueError(
        f"max_source_length={max_length} leaves no token for the source: the prompt around it alone takes about "
        f"{around} tokens. Raise max_source_length or shorten prompt_template."
    )


@functools.lru_cache
def _on_day(prompt_date) -> str:
    """What makes a chat template behind it take `prompt_date` for today, at midnight.

    A macro in place of transformers' own function, with each directive of strftime filled in: values given to
    `apply_chat_template` are plain data since 5.24, and a function is not.
    """
    day = datetime.combine(_parse_date(prompt_date), time())
    fills = {letter: day.strftime(f"%{letter}") for letter in _DIRECTIVES}
    filters = "".join(
        f"|replace('%{letter}', {value!r})|replace('%-{letter}', {value.lstrip('0') or '0'!r})"
        for letter, value in fills.items()
    )
    # The line break is no part of what is rendered (`trim_blocks`), and the template begins where a line does.
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n"


def _parse_date(prompt_date) -> date:
    try:
        return date.fromisoformat(prompt_date)
    except (TypeError, ValueError):
        raise ValueError(f"prompt_date={prompt_date!r} is no date: give YYYY-MM-DD, as in '2026-11-28'.") from None


def _first_tokens(tokenizer, text, ids, count) -> str:
    """The text of the first `count` tokens, as it stands in the source where the tokenizer knows offsets."""
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text[: offsets[count - 1][1]]
    return tokenizer.decode(ids[:count])
