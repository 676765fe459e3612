"""What a cache is known by: the key of each row, and hashes of the teacher that it was captured from."""

import hashlib
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ...models.either_version import rope_parameters


def row_keys(
    input_ids: Tensor, attention_mask: Tensor, rows: Tensor, columns: Tensor, images_digest: Tensor | None = None
) -> list[bytes | None]:
    """The key of each row of a batch `[B, L]`: a hash of the tokens that the teacher reads, of the columns, counted
    from the first of them, that it is asked about, and of its images, if it has any. None for a row that it is not
    asked about.

    Args:
        images_digest: `[B, 16]`, `teacher_images_digest` of the batch.
    """
    asked = np.zeros(input_ids.shape, dtype=bool)
    asked[rows.cpu().numpy(), columns.cpu().numpy()] = True
    read = attention_mask.bool().cpu().numpy()
    images = np.zeros((len(asked), 0), dtype=np.uint8) if images_digest is None else images_digest.cpu().numpy()
    keys: list[bytes | None] = []
    for ids, is_read, is_asked, of_images in zip(input_ids.cpu().numpy(), read, asked, images, strict=True):
        if not is_asked.any():
            keys.append(None)
            continue
        digest = hashlib.blake2b(ids[is_read].astype("<i4").tobytes(), digest_size=16)
        digest.update(np.flatnonzero(is_asked[is_read]).astype("<i4").tobytes())
        if of_images.any():
            digest.update(of_images.tobytes())
        keys.append(digest.digest())
    return keys


# Where a teacher came from, in which dtype it was loaded and by which version does not make it another one.
_NO_PART_OF_A_TEACHER = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "_attn_implementation_autoset",
    "head_dim",  # follows from the weights and the number of heads; 4.57 leaves it to some models
}
# What transformers 4.57 writes of each model that is not None or false, and 5.x of none: goes with 4.57.
_WRITTEN_BY_4_57 = {
    **dict.fromkeys(("min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "diversity_penalty"), 0),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "temperature", "top_p", "typical_p"), 1),
    **{"repetition_penalty": 1, "length_penalty": 1, "max_length": 20, "top_k": 50, "pruned_heads": {}},
}
_ROPE = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}


_NO_PART_OF_AN_ADAPTER = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"}


def adapter_digest(model: PreTrainedModel) -> str | None:
    """SHA-256 over the configurations of PEFT's active adapters and their weights; None for a model without."""
    if not getattr(model, "peft_config", None):
        return None
    from peft import get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    # Asked of the layers: models that transformers put an adapter into answer only with PEFT's very newest version.
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    described = []
    for name in sorted({name for layer in layers for name in layer.active_adapters}):
        config = model.peft_config[name].to_dict()  # type: ignore[attr-defined]  # PEFT's has it
        config = {key: value for key, value in config.items() if key not in _NO_PART_OF_AN_ADAPTER}
        described.append([_digest_of(config), _digest_of_tensors(get_peft_model_state_dict(model, adapter_name=name))])
    return _digest_of(described)


def config_digest(model: PreTrainedModel, but: tuple[str, ...] = ()) -> str:
    """SHA-256 over a model's configuration, without what says only where it came from.

    It is the same with transformers 4.57 and 5.x for the families that both read alike (`models/either_version`).

    Args:
        but: how the names of further fields begin that are left out.
    """
    return _digest_of({name: value for name, value in _described(model.config).items() if not name.startswith(but)})


def _described(config: PretrainedConfig) -> dict[str, Any]:
    """What a config says, and those in it, of eyes and of a language model, without what it says that there is not:
    one version leaves that out."""
    fields = {}
    for name, value in config.to_dict().items():
        of_a_part = getattr(config, name, None)
        if isinstance(of_a_part, PretrainedConfig):
            fields[name] = _described(of_a_part)
        elif value is None or value is False or value == _WRITTEN_BY_4_57.get(name):
            continue
        elif name not in _NO_PART_OF_A_TEACHER:
            fields[name] = value
    if not _ROPE.isdisjoint(fields):
        fields = {name: value for name, value in fields.items() if name not in _ROPE}
        fields["rope_parameters"] = rope_parameters(config)
    return fields


def tokenizer_digest(tokenizer) -> str | None:
    """SHA-256 over the tokens and their ids; None without a tokenizer."""
    if tokenizer is None:
        return None
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over names and bytes of all weights, those of an adapter among them."""
    return _digest_of_tensors(model.state_dict())


def images_digest(images: dict[str, Tensor]) -> Tensor:
    """`[16]` bytes of a hash over what a teacher reads of a row beside tokens; zeros where that is nothing.

    Args:
        images: by the names of columns; the teacher's own and the student's that it reads are the same.
    """
    if not images:
        return torch.zeros(16, dtype=torch.uint8)
    digest = _digest_of_tensors({name.removeprefix("teacher_"): image for name, image in images.items()})
    return torch.tensor(list(bytes.fromhex(digest)[:16]), dtype=torch.uint8)


def _digest_of(described: Any) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=_jsonable).encode()).hexdigest()


def _jsonable(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _digest_of_tensors(tensors: "dict[str, Tensor]") -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
