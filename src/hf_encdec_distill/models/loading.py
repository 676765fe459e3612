"""How a model, its config or its tokenizer is read from a folder or the Hub, of whoever made it.

All that can be wrong with what is there is said in one line: a ValueError, or an OSError where something is missing.
"""

import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.generation import GenerationMixin
from transformers.integrations import is_deepspeed_zero3_enabled

from ..files import check_own_files, named_inside, one_line, read_json, what_it_is
from .either_version import check_rope_is_read, tokenizer_mend
from .families import STUDENTS
from .prompts import distinct_pad_token


_CONFIG, _ADAPTER, _TOKENIZER_CONFIG = "config.json", "adapter_config.json", "tokenizer_config.json"
_PROCESSOR = "processor_config.json"
_INDEX, _FAST_TOKENIZER = "model.safetensors.index.json", "tokenizer.json"
_NAMED_BY_TOKENIZER = ("vocab_file", "merges_file", "tokenizer_file")
_WEIGHTS = (".safetensors", ".bin", ".gguf")
# One of these is in every folder with a tokenizer.
_TOKENIZERS = (_TOKENIZER_CONFIG, _FAST_TOKENIZER, "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_OF_FILES = (".json", ".jsonl", ".yaml", ".yml", ".csv", ".txt", ".safetensors", ".bin", ".pt", ".gguf", ".onnx")
_SECONDS_TO_ANSWER = 10.0


def load_config(name: str | os.PathLike) -> transformers.PretrainedConfig:
    """
    Raises:
        OSError: there is no such folder, and no such model on the Hub.
        ValueError: it is no model's, or cannot be read.
    """
    with _reading(name, "a config"):
        _check_model(find(name), name)
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def load_tokenizer(
    name: str | os.PathLike, cls: type[AutoTokenizer] | type[transformers.PreTrainedTokenizerBase] = AutoTokenizer
):
    """It pads with a token for which the model beside it has an embedding.

    Args:
        cls: an auto class or the class of a tokenizer.

    Raises:
        OSError: there is no such folder, no such model on the Hub, or no tokenizer.
        ValueError: the tokenizer cannot be read.
    """
    _check_saved(name, "tokenizer", _TOKENIZERS)
    with _reading(name, "a tokenizer", _check_tokenizer):
        tokenizer = cls.from_pretrained(name, trust_remote_code=False)
    config = find(name) / _CONFIG
    size = read_json(config).get("vocab_size") if config.is_file() else None
    if isinstance(size, int) and tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= size:
        tokenizer.pad_token = distinct_pad_token(tokenizer, size)
    return tokenizer


def load_generation_config(name: str | os.PathLike) -> GenerationConfig:
    """Raises as `load_config` does."""
    with _reading(name, "a generation config"):
        return GenerationConfig.from_pretrained(name)


def check_generation(name: str | os.PathLike, generation: GenerationConfig, vocab_size: int) -> None:
    """Raises ValueError where an answer begins or ends with what is no token of the model `name`."""
    ends = generation.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    for token in (generation.decoder_start_token_id, *ends):
        if token is not None and not (type(token) is int and 0 <= token < vocab_size):
            raise ValueError(
                f"the generation config of {name} has the token {token!r}, expected one of 0 to {vocab_size - 1}: "
                "mend its decoder_start_token_id or eos_token_id"
            )


def check_decoder_only(name, config) -> None:
    """Raises ValueError where the config of the teacher `name` is that of an encoder-decoder."""
    if getattr(config, "is_encoder_decoder", False):
        student = " as students are" if config.model_type in STUDENTS else ""
        raise ValueError(
            f"the teacher {name} is an encoder-decoder{student} ({config.model_type}): give a decoder-only model, as "
            "the student was made from"
        )


def load_teacher(name: str | os.PathLike, **options: Any):
    """A decoder-only model with its head, in eval mode; a PEFT adapter on its base; one that sees with its eyes.

    Args:
        options: `dtype` and others of `from_pretrained`.

    Raises:
        OSError: there is no such folder, and no such model on the Hub.
        ValueError: it is an encoder-decoder, cannot be read, lacks tensors that its config asks for, or was saved by
            a version of transformers whose RoPE this one does not read.
        ImportError: it is an adapter and peft is missing.
    """
    base = base_of(name)
    config = load_config(base)
    check_decoder_only(name, config)
    check_rope_is_read(config)
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    model = _load(AutoModelForImageTextToText if sees else AutoModelForCausalLM, name, "a teacher", options)
    if base != name:
        _check_adapter(model, name)
    return model


def load_merged_teacher(name: str | os.PathLike, **options: Any):
    """As `load_teacher`, an adapter merged into its base: a model of transformers alone, all of whose weights train.

    Raises:
        ValueError: also for an adapter that cannot be merged.
    """
    base = base_of(name)
    if base == name:
        return load_teacher(name, **options)
    try:
        from peft import PeftModel
    except ModuleNotFoundError as error:
        raise ImportError(f'{error}; an adapter needs pip install "hf-encdec-distill[peft]"') from error
    model = load_teacher(base, **options)
    with _reading(name, "a teacher", _check_weights):
        adapted = PeftModel.from_pretrained(model, os.fspath(name))
        _check_adapter(adapted, name)
        return adapted.merge_and_unload().requires_grad_(True).eval()


def base_of(name: str | os.PathLike) -> str | os.PathLike:
    """The model that an adapter is for, and `name` itself where it is none; errors as of `find`.

    Raises:
        ValueError: an adapter does not say.
    """
    file = find(name) / _ADAPTER
    if not file.is_file():
        return name
    return read_json(file, fields={"base_model_name_or_path": str})["base_model_name_or_path"]


def load_student(name: str | os.PathLike, **options: Any):
    """An encoder-decoder with its head, in eval mode; arguments and errors as of `load_teacher`."""
    config = load_config(name)
    if not getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"the student {name} is a decoder-only model ({config.model_type}): make an encoder-decoder from it with "
            "hf-encdec-distill init, or RopeEncDecForConditionalGeneration.from_decoder_only"
        )
    cls = AutoModelForImageTextToText if reads_images(config) else AutoModelForSeq2SeqLM
    student = _load(cls, name, "a student", options)
    check_generation(name, student.generation_config, config.get_text_config(decoder=True).vocab_size)
    return student


def reads_images(config: transformers.PretrainedConfig) -> bool:
    """Whether it is that of an encoder-decoder with a vision tower."""
    return getattr(config, "vision_config", None) is not None


def load_processor(name: str | os.PathLike):
    """Of a student that reads images.

    Raises:
        OSError: there is no such folder, no such model on the Hub, or no processor.
        ValueError: the processor cannot be read.
    """
    _check_saved(name, "tokenizer", _TOKENIZERS)
    _check_saved(name, "processor", [_PROCESSOR])
    with _reading(name, "a processor", _check_tokenizer):
        return AutoProcessor.from_pretrained(name, trust_remote_code=False)


def load_student_of_any_kind(name: str | os.PathLike, **options: Any):
    """An encoder-decoder or a decoder-only model; arguments and errors as of `load_teacher`."""
    config = load_config(name)
    if getattr(config, "is_encoder_decoder", False):
        return load_student(name, **options)
    check_rope_is_read(config)
    return _load(AutoModelForCausalLM, name, "a student", options)


def check_folder(folder: Path) -> None:
    """All that is asked of a folder before transformers looks into it; of the Hub's, of what is in the cache so far.

    Raises:
        ValueError: it is not what it should be.
    """
    check_own_files(folder, but=_WEIGHTS)  # which lie on another disk in many places, and are no text to be passed on
    for name in (_CONFIG, _ADAPTER, "generation_config.json", _PROCESSOR, "preprocessor_config.json"):
        if (folder / name).is_file():
            content = read_json(folder / name)
            auto_map = content.get("auto_map") or {}
            if not isinstance(auto_map, dict) or not all(isinstance(to, str | list) for to in auto_map.values()):
                raise ValueError(f"{folder / name} has the auto_map {auto_map!r}, expected an object of class names")
    if (folder / _TOKENIZER_CONFIG).is_file():
        for name in _NAMED_BY_TOKENIZER:
            # transformers 4.57 reads such a file in place of the folder's own.
            value = read_json(folder / _TOKENIZER_CONFIG).get(name)
            if isinstance(value, str) and os.path.isfile(value) and Path(value).absolute().parent != folder.absolute():
                raise ValueError(
                    f"{folder / _TOKENIZER_CONFIG} has {name}={value!r}, expected a file of that folder: remove it"
                )
    if (folder / _INDEX).is_file():
        weight_map = read_json(folder / _INDEX, fields={"weight_map": dict})["weight_map"]
        for shard in weight_map.values():
            named_inside(folder, shard)
        if not weight_map:
            raise ValueError(f"{folder / _INDEX} names no weights: save the model again")


def find(name: str | os.PathLike) -> Path:
    """Where the files of a model are: its folder or, in the cache of the Hub, that of its snapshot, which has the
    config at least. The Hub is asked once about a name, and keeps nobody waiting.

    Raises:
        OSError: there is no such folder, and the Hub does not have it or cannot be asked.
        ValueError: it is a file.
    """
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name):
        raise ValueError(f"{name} is a file, expected a folder with a model or a name on the Hub")
    return _find_on_hub(os.fspath(name))


@functools.cache
def _find_on_hub(name: str) -> Path:
    # transformers would ask for five files one after the other, and try each again for 20 seconds.
    no_folder = f"there is no folder {name}"
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise FileNotFoundError(f"{no_folder}, and it cannot be a name on the Hub, which is user/name") from None
    if name.endswith(_OF_FILES):
        raise FileNotFoundError(f"{no_folder}, nor a file of that name")
    files = (_CONFIG, _ADAPTER, _TOKENIZER_CONFIG)
    for file in files:
        cached = try_to_load_from_cache(name, file)
        if isinstance(cached, str):
            return Path(cached).parent
    api = HfApi()
    try:
        there = [sibling.rfilename for sibling in api.model_info(name, timeout=_SECONDS_TO_ANSWER).siblings or ()]
        for file in files:
            if file in there:
                return Path(hf_hub_download(name, file)).parent
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{no_folder}, and {api.endpoint} has no model of that name; for a private one log in (hf auth login)"
        ) from None
    except Exception as error:  # of the client's HTTP library, which is not the same for all its versions
        raise OSError(f"{no_folder}, and {api.endpoint} does not give it: {one_line(error)}") from error
    raise ValueError(f"{name} on {api.endpoint} holds no model, there is no {_CONFIG}: name another")


def _load(
    cls: type[AutoModelForCausalLM] | type[AutoModelForImageTextToText] | type[AutoModelForSeq2SeqLM],
    name: str | os.PathLike,
    what: str,
    options: dict[str, Any],
):
    # With ZeRO-3 no parameter has its shape yet. Elsewhere all tensors that do not fit are wanted, not an error that
    # says of the first, or in transformers 5 of none, which it is.
    # Left open, transformers asks on the terminal whether to run a stranger's code.
    options = {"ignore_mismatched_sizes": not is_deepspeed_zero3_enabled(), "trust_remote_code": False, **options}
    with _said_afterwards("transformers.modeling_utils"):
        with _reading(name, what, _check_weights), _without_code_of_strangers():
            pair = cls.from_pretrained(name, output_loading_info=True, **options)
            model, loaded = pair  # type: ignore[misc]  # output_loading_info adds one
        _check_complete(model, name, loaded)
    return model


@contextmanager
def _without_code_of_strangers() -> Iterator[None]:
    """A folder's custom_generate/generate.py takes the place of `generate` only where its code is trusted.

    So it is in transformers 5. 4.57 asks for no trust where the folder is a local one; this can go with it.
    """
    load = GenerationMixin.load_custom_generate

    def load_if_trusted(self, name, trust_remote_code=None, **kwargs):
        if not trust_remote_code:
            raise OSError(f"the custom_generate of {name} is not trusted")  # as if there were none
        return load(self, name, trust_remote_code=trust_remote_code, **kwargs)

    GenerationMixin.load_custom_generate = load_if_trusted  # type: ignore[method-assign, assignment]  # replaced on purpose
    try:
        yield
    finally:
        GenerationMixin.load_custom_generate = load  # type: ignore[method-assign]  # put back


def _check_complete(model, name: str | os.PathLike, loaded: dict[str, Any]) -> None:
    """Raises ValueError where tensors of the model are not those of its file: they would be drawn at random."""
    misshapen = [key if isinstance(key, str) else key[0] for key in loaded["mismatched_keys"]]
    missing = [key for key in loaded["missing_keys"] if key not in misshapen]
    problems = []
    if missing:
        problems.append(f"{_some(sorted(missing))} missing")
    if misshapen:
        shapes = model.state_dict()
        names = [f"{key} (expected {tuple(shapes[key].shape)})" for key in sorted(misshapen) if key in shapes]
        problems.append(f"{_some(names)} of another shape")
    if problems:
        raise ValueError(
            f"the weights in {name} are not those of its config: {'; '.join(problems)}. Save the model again, or put "
            "its own config.json there"
        )


def _check_adapter(model, name: str | os.PathLike) -> None:
    """As `_check_complete`, for an adapter's own tensors, of which transformers 4.57 tells in its log alone."""
    from peft import get_peft_model_state_dict

    file = find(name) / "adapter_model.safetensors"
    if not file.is_file():
        return  # weights in another format: PEFT has read them
    there = {key.removeprefix("base_model.model.") for key in load_file(file)}
    wanted = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
    missing = sorted(key for key in wanted if key.removeprefix("base_model.model.") not in there)
    if missing:
        raise ValueError(f"the adapter in {name} is not that of its config: {_some(missing)} missing. Save it again")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def _reading(
    name: str | os.PathLike, what: str, check: Callable[[Path], None] = lambda folder: None
) -> Iterator[None]:
    """What any library raises inside, about what it read from `name`, comes out as one line.

    Args:
        check: looks for what is wrong with files of the folder, which says more than the error of a library.
    """
    folder = find(name)
    check_folder(folder)
    try:
        yield
    except Exception as error:
        if isinstance(error, ImportError):
            # transformers 4.57 asks for protobuf in order to say what is wrong with a tokenizer.json.
            if not isinstance(error.__context__, Exception) or not (folder / _FAST_TOKENIZER).is_file():
                raise
            error = error.__context__
        check(find(name))
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{name} does not load as {what}: {one_line(error)}") from error


@contextmanager
def _said_afterwards(name: str) -> Iterator[None]:
    """What a logger says inside is kept for afterwards, and not said at all where an error says it."""
    logger, records = logging.getLogger(name), []

    def keep(record: logging.LogRecord) -> bool:
        records.append(record)
        return False

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
    for record in records:
        logger.handle(record)


def _check_model(folder: Path, name: str | os.PathLike) -> None:
    if not (folder / _CONFIG).is_file():
        if (folder / _ADAPTER).is_file():
            raise ValueError(
                f"{name} is an adapter, and a whole model is needed: merge it, model.merge_and_unload() of PEFT, and "
                "save that with its tokenizer"
            )
        raise FileNotFoundError(
            f"{name} holds no model, there is no {_CONFIG}: name a folder that save_pretrained wrote"
        )
    read_json(folder / _CONFIG, fields={"model_type": str})


def _check_weights(folder: Path) -> None:
    """Raises ValueError for the first file that holds no tensors, or not all that it says."""
    if (folder / _INDEX).is_file() and not (folder / "model.safetensors").is_file():
        shards = set(read_json(folder / _INDEX)["weight_map"].values())
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing:
            raise ValueError(f"{folder / _INDEX} names {_some(missing)}, not there: save the model again")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except Exception as error:
            reason = what_it_is(file) or _cut(file) or f"{one_line(error)}; download or save it again"
            raise ValueError(f"{file} holds no weights: {reason}") from error


def _cut(file: Path) -> str | None:
    """Safetensors begin with the length of a header, as eight bytes, and the header."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        needed = 8 + int.from_bytes(stream.read(8), "little")
        begin = stream.read(1)
    if begin not in (b"{", b""):
        return None
    of = f"of a header of {needed}" if size < needed else "that are not those its header tells of"
    return f"it was cut or altered, it has {size} bytes {of}; download or save it again"


def _check_saved(name: str | os.PathLike, what: str, files: Iterable[str]) -> None:
    """Raises OSError where a folder has none of the files that `what` is saved in, or there is no model `name`."""
    folder = find(name)
    if Path(name).is_dir() and not any((folder / file).is_file() for file in files):
        raise FileNotFoundError(f"{name} has no {what}: save it there, {what}.save_pretrained({os.fspath(name)!r})")


def _check_tokenizer(folder: Path) -> None:
    for name in (_TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "tokenizer.json", "vocab.json"):
        if (folder / name).is_file():
            read_json(folder / name)
    for name in ("tokenizer.model", "spiece.model", "vocab.txt", "merges.txt"):
        if (folder / name).is_file() and (reason := what_it_is(folder / name)):
            raise ValueError(f"{folder / name} holds no tokenizer: {reason}")
    config = folder / _TOKENIZER_CONFIG
    if config.is_file() and (mend := tokenizer_mend(read_json(config))):
        raise ValueError(f"transformers {transformers.__version__} cannot load the tokenizer in {folder}: {mend}")
