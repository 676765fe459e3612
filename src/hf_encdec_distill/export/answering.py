"""An exported folder's greedy answers without torch and transformers, whose import takes longer than an answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import check_own_files, read_json
from ..models.families import STUDENTS
from .manifest import load_graphs, read_manifest


if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Of config.json: what the shapes of the graphs depend on, and of a student that reads images, there and in its
# vision_config.
_SIZES = ("num_key_value_heads", "head_dim", "decoder_num_hidden_layers", "vocab_size")
_SIZES_OF_IMAGES = ("hidden_size", "image_token_id", "projector_pixel_shuffle")
_SIZES_OF_TOWER = ("image_size", "patch_size")
# Of generation_config.json: what is read here, and what greedy search for one prompt does not depend on.
_READ = ("decoder_start_token_id", "eos_token_id")
_WITHOUT_EFFECT = (
    "bos_token_id",
    "pad_token_id",
    "max_length",  # the caller says how many
    "max_new_tokens",
    "use_cache",
    "transformers_version",
    "_from_model_config",
)
# Settings of a search, as they leave greedy search alone; those not named here do so where they are None or False.
_GREEDY = {
    "do_sample": False,
    "early_stopping": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "min_length": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "remove_invalid_values": False,
}
# Of tokenizer_config.json: classes that take tokenizer.json as it is, what changes neither ids nor texts, and what has
# to be off.
_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
_OF_BATCHES = (
    "tokenizer_class",
    "model_max_length",
    "model_input_names",
    "padding_side",
    "truncation_side",
    "chat_template",
    "backend",
    "is_local",
    "local_files_only",
    "name_or_path",
)
_OFF = ("clean_up_tokenization_spaces", "split_special_tokens", "extra_special_tokens", "additional_special_tokens")


class NeedsTransformers(ValueError):
    """The folder asks for something that only transformers does: load it with [`ExportedForConditionalGeneration`]."""


class ExportedStudent:
    """The greedy answers of [`ExportedForConditionalGeneration`], token for token, one prompt at a time.

    Of a student that reads images those to prompts without any: a processor is transformers', and imports torch. Who
    has pixels and ids from elsewhere gives them to `generate`.

    Args:
        folder: an exported folder.

    Attributes:
        config: the fields of `config.json`.

    Raises:
        NeedsTransformers: its generation config asks for more than greedy search, its tokenizer for more than
            `tokenizer.json`, or a file of either is missing or cannot be read.
        ValueError: it holds no export, one of a newer version, or a file that is not as it was written.
        ImportError: the runtime is missing; the message has the line that installs it.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.config, self._start, self._ends = _read_search(folder)
        self._tokenizer = _read_tokenizer(folder)
        self._graphs = load_graphs(folder, read_manifest(folder), self.config)

    def encode(self, text: str) -> list[int]:
        """The prompt of a text, with the template that is built into the tokenizer."""
        return self._tokenizer.encode(text).ids

    def generate(
        self, ids: Sequence[int], max_new_tokens: int, pixel_values: np.ndarray | None = None
    ) -> Iterator[int]:
        """The answer to the prompt `ids`, each token as soon as it is there, the one that ends it included.

        Args:
            pixel_values: `(I, 3, height, width)` of the prompt's images, normalised.

        Raises:
            ValueError: the prompt is empty or longer than the graphs take, or the answer becomes so, or the images are
                not those of the prompt's image tokens.
        """
        if not ids:
            raise ValueError("a prompt of 0 tokens: give at least one")
        prompt = np.array([ids], dtype=np.int64)
        cross, mask = self._graphs.encode(prompt, np.ones_like(prompt), pixel_values)
        cache, token = self._graphs.new_cache(1), self._start
        for _ in range(max_new_tokens):
            logits = self._graphs.decode(np.array([[token]], dtype=np.int64), mask, cross, cache)
            token = int(logits[0, -1].argmax())
            yield token
            if token in self._ends:
                return

    def decode(self, ids: Iterable[int]) -> str:
        """The text of an answer. The start token, which is the prompt's last, does not belong to it."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def answer(self, text: str, max_new_tokens: int) -> str:
        """
        Raises:
            ValueError: as `generate` does.
        """
        return self.decode(self.generate(self.encode(text), max_new_tokens))


def _read_search(folder: Path) -> tuple[SimpleNamespace, int, frozenset[int]]:
    """The config, the token that an answer begins with, and those that end it."""
    config, generation = _read(folder, "config.json"), _read(folder, "generation_config.json")
    vision = config.get("vision_config")
    sizes = _SIZES if vision is None else (*_SIZES, *_SIZES_OF_IMAGES)
    if config.get("model_type") not in STUDENTS or not all(_is_count(config.get(name)) for name in sizes):
        raise NeedsTransformers(f"{folder / 'config.json'} is not that of a student")
    if vision is not None:
        if not isinstance(vision, dict) or not all(_is_count(vision.get(name)) for name in _SIZES_OF_TOWER):
            raise NeedsTransformers(f"{folder / 'config.json'} does not say what its vision tower is")
        config["vision_config"] = SimpleNamespace(**vision)
    for name, value in generation.items():
        is_off = value is None or value is False  # 0 may be a token
        if not is_off and name not in (*_READ, *_WITHOUT_EFFECT) and value != _GREEDY.get(name):
            raise NeedsTransformers(
                f"{folder / 'generation_config.json'} asks for {name}={value!r}, not greedy search"
            )
    # transformers 4.57 takes these from there, 5 refuses them.
    if named := [name for name in _GREEDY if config.get(name) is not None]:
        raise NeedsTransformers(f"{folder / 'config.json'} has settings of a search: {', '.join(named)}")
    start, end = (generation.get(name) for name in _READ)
    ends = [] if end is None else end if isinstance(end, list) else [end]
    if start is None or not all(map(_is_count, [start, *ends])):
        raise NeedsTransformers(f"{folder / 'generation_config.json'} does not say where an answer begins and ends")
    if start >= config["vocab_size"]:
        raise ValueError(f"{folder / 'generation_config.json'} begins answers with {start}, which is no token")
    return SimpleNamespace(**config), start, frozenset(ends)


def _read_tokenizer(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # it raises nothing more precise
        raise NeedsTransformers(f"{folder / 'tokenizer.json'} cannot be read: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    config = _read(folder, "tokenizer_config.json")
    if config.get("tokenizer_class") not in _TOKENIZERS or config.get("clean_up_tokenization_spaces") is not False:
        raise NeedsTransformers(f"{folder / 'tokenizer_config.json'} asks for more than tokenizer.json")
    older = _read(folder, "special_tokens_map.json") if (folder / "special_tokens_map.json").exists() else {}
    for name, value in (*older.items(), *{"add_prefix_space": False, **config}.items()):
        if not _says_nothing_new(name, value, tokenizer):
            raise NeedsTransformers(f"the tokenizer of {folder} has {name}={value!r}, which tokenizer.json has not")
    return tokenizer


def _says_nothing_new(name: str, value: Any, tokenizer: Tokenizer) -> bool:
    """Whether a setting of transformers leaves what is in `tokenizer.json` as it is."""
    added = tokenizer.get_added_tokens_decoder()
    if name == "added_tokens_decoder":
        known = {str(id): token.__getstate__() for id, token in added.items()}
        return isinstance(value, dict) and all(known.get(id) == token for id, token in value.items())
    if name.endswith("_token"):
        content = value.get("content") if isinstance(value, dict) else value
        return content in {token.content for token in added.values() if token.special}
    if name == "add_prefix_space":
        return value == getattr(tokenizer.pre_tokenizer, name, False)
    return name in _OF_BATCHES or (name in _OFF and not value)


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        check_own_files(folder)
        return read_json(folder / name)
    except (OSError, ValueError) as error:  # transformers' way says what is wrong, or can do without
        raise NeedsTransformers(f"{folder / name} cannot be read: {error}") from error


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
