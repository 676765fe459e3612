"""Teachers that transformers 4.57 and 5.x read alike: written so here, and refused where another's would be misread.

5.x keeps RoPE in `config.rope_parameters`, where 4.57 does not look, and goes on with a base of 10000; and it names
classes of tokenizers that 4.57 does not have. The other way round 5.x reads all that 4.57 writes. Goes with 4.57.
"""

import json
import os
from pathlib import Path

import transformers

from ..files import read_json, write_text
from . import SUPPORTED_FAMILIES
from .prompts import in_a_class_of_both_versions
from .rope_encdec.compat_rope_encdec import ROPE_LIVES_IN_ONE_DICT


# Those of which 4.57 reads each number of 5.x's dict, in `rope_scaling`. Phi-3 has a form of its own.
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


def save_teacher(model, tokenizer, folder: str | os.PathLike) -> None:
    """Save a causal language model (or its PEFT adapter) and its tokenizer so that 4.57 and 5.x load them alike."""
    model.save_pretrained(folder)
    in_a_class_of_both_versions(tokenizer).save_pretrained(folder)
    add_fields_of_4_57(model.config, folder)


def add_fields_of_4_57(config, folder: str | os.PathLike) -> None:
    """What 4.57 needs to know of `config`, in the config.json that 5.x has written beside all but adapters."""
    file = Path(folder, "config.json")
    parameters = getattr(config, "rope_parameters", None) if ROPE_LIVES_IN_ONE_DICT else None
    fields = fields_of_4_57(config.model_type, parameters)
    if fields is not None and file.is_file():
        write_text(file, json.dumps(read_json(file) | fields, indent=2) + "\n")


def fields_of_4_57(model_type: str, rope_parameters: dict | None) -> dict | None:
    """What says in a config of 4.57 what 5.x says in `rope_parameters`; None where nothing does.

    `rope_theta` and `rope_scaling`, read by `modeling_rope_utils` of 4.57, and `partial_rotary_factor`.
    """
    # Without a base of its own it is a dict for each kind of layer.
    if model_type not in SUPPORTED_FAMILIES or rope_parameters is None or "rope_theta" not in rope_parameters:
        return None
    scaling = {k: v for k, v in rope_parameters.items() if k not in ("rope_theta", "partial_rotary_factor")}
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if model_type == "phi3" and rope_type == "longrope":
        # Phi3Config of 4.57 takes these three alone; the length before scaling stands beside them in either version.
        scaling = {"type": "longrope", **{name: scaling[name] for name in ("short_factor", "long_factor")}}
    elif rope_type not in _ROPE_TYPES:
        return None
    fields = {"rope_theta": rope_parameters["rope_theta"], "rope_scaling": None if rope_type == "default" else scaling}
    turned = rope_parameters.get("partial_rotary_factor", 1.0)
    return fields if turned == 1.0 else fields | {"partial_rotary_factor": turned}


def rope_parameters(config) -> dict:
    """What 5.x says in `rope_parameters`, of a config of either version, which gives the same for one model."""
    if getattr(config, "rope_parameters", None):  # transformers >= 5.0
        parameters = dict(config.rope_parameters)
    else:
        scaling = getattr(config, "rope_scaling", None)
        turned = getattr(config, "partial_rotary_factor", 1.0)
        parameters = {**(scaling or {}), "rope_theta": config.rope_theta, "partial_rotary_factor": turned}
        if scaling and getattr(config, "original_max_position_embeddings", None):
            parameters["original_max_position_embeddings"] = config.original_max_position_embeddings
    older = parameters.pop("type", "default")
    parameters.setdefault("rope_type", older)
    # Of the families Phi-3 alone reads it of the plain RoPE (v5.24.0); 4.57 does not run others that have one.
    is_unread = ROPE_LIVES_IN_ONE_DICT and config.model_type in set(SUPPORTED_FAMILIES) - {"phi3"}
    if parameters.get("partial_rotary_factor") == 1.0 or (is_unread and parameters["rope_type"] == "default"):
        parameters.pop("partial_rotary_factor", None)
    return parameters


def check_rope_is_read(config) -> None:
    """Raises ValueError where this version computes another RoPE than the one that a teacher's config names.

    Args:
        config (`PreTrainedConfig`): As it was loaded; of a folder, a Hub id or a model.
    """
    config = config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None)
    scaling = getattr(config, "rope_scaling", None) or {}
    length = scaling.get("original_max_position_embeddings")
    is_long = "longrope" in (scaling.get("rope_type"), scaling.get("type"))
    # Where it does not find the length, 4.57 takes the other one.
    taken = getattr(config, "original_max_position_embeddings", getattr(config, "max_position_embeddings", None))
    if not ROPE_LIVES_IN_ONE_DICT and is_long and length not in (None, taken):
        raise ValueError(
            f"the teacher {config._name_or_path or config.model_type!r} has original_max_position_embeddings={length} "
            f"in rope_scaling, where transformers {transformers.__version__} does not look: it would be another "
            f'model. Use transformers 5, or add "original_max_position_embeddings": {length} to its config.json.'
        )
    if ROPE_LIVES_IN_ONE_DICT or not parameters or config.model_type == "rope_encdec":
        return
    fields = fields_of_4_57(config.model_type, parameters)
    if fields is not None and all(getattr(config, name, None) == value for name, value in fields.items()):
        return
    lines = "" if fields is None else f", or add {json.dumps(fields)[1:-1]} to its config.json"
    raise ValueError(
        f"the teacher {config._name_or_path or config.model_type!r} was saved by transformers "
        f"{config.transformers_version or 5}, with rope_parameters={parameters}, which transformers "
        f"{transformers.__version__} does not read: it would be another model. Use it where transformers 5 is "
        f"installed{lines}."
    )


def tokenizer_mend(config: dict) -> str:
    """What to do about a tokenizer that could not be read, by its tokenizer_config.json; "" if that does not say."""
    changes = []
    if config.get("tokenizer_class") == "TokenizersBackend":
        changes.append('set "tokenizer_class": "PreTrainedTokenizerFast"')
    if isinstance(config.get("extra_special_tokens"), list):
        changes.append('rename "extra_special_tokens" to "additional_special_tokens"')
    if ROPE_LIVES_IN_ONE_DICT or not changes:
        return ""
    return (
        "it was saved by transformers 5. Use it where that is installed, or, in its tokenizer_config.json, "
        + " and ".join(changes)
    )
