"""Writes teachers that the other version of transformers has to read alike: PYTHONPATH=src:tests:tests/model python
tests/model/freeze_teachers.py, once where 4.57 is installed and once with 5.x.

In `teachers/MAJOR.MINOR` of transformers: `whole`, a Llama as our commands save it, its `adapter`, and `foreign`, the
same as transformers alone saves it; for each of `CASES` a config, whose weights are `filled`; and what all answer.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizer_toys import unigram
from transformers import AutoConfig, AutoModelForCausalLM

from hf_encdec_distill.models.either_version import save_teacher


TEACHERS = Path(__file__).parent / "teachers"
TEXTS = ["Return the sum of two numbers.", "Two dogs. <sentinel> and a line"]
VOCAB = 96
_LONG = {"original_max_position_embeddings": 8}
# Family and what it names besides sizes, in the words of the Hub, which both versions read.
CASES = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama3": ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 4.0, **_LONG}}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 8}),
    "qwen2": ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, **_LONG}}),
    "qwen3": ("qwen3", {"head_dim": 8, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    "qwen3-dynamic": ("qwen3", {"head_dim": 4, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "phi3": ("phi3", {**_LONG, "partial_rotary_factor": 0.5}),
    "phi3-longrope": (
        "phi3",
        {**_LONG, "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]}},
    ),
}
CASES["llama3"][1]["rope_scaling"] |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def make_config(case):
    family, fields = CASES[case]
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16,
        "rope_theta": 300.0,
    }
    special = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    return AutoConfig.for_model(family, **sizes, **special, **json.loads(json.dumps(fields)))


@torch.no_grad()
def filled(model):
    """The model with weights of 0.2 to either side, norms around 1, by a formula that no version changes."""
    for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
        wave = (torch.arange(parameter.numel(), dtype=torch.float64) * (1.7 + 0.31 * number)).sin().view_as(parameter)
        parameter.copy_(wave * 0.3 + (parameter.dim() == 1))
    return model.eval()


@torch.no_grad()
def logits(model):
    """Those of each fourth of 24 tokens, past the lengths that some of these RoPE types begin to stretch at."""
    return model(torch.arange(24)[None] * 5 % VOCAB, use_cache=False).logits[:, ::4].contiguous()


def make_tokenizer():
    tokenizer = unigram(VOCAB - 1)
    tokenizer.add_tokens(["<sentinel>"], special_tokens=True)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}: {% endfor %}"
    return tokenizer


def make_adapter(model):
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():  # PEFT starts from a product of zero
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return adapted.eval()


def freeze(folder: Path) -> None:
    expected, tokenizer = {}, make_tokenizer()
    for case in CASES:
        model = filled(AutoModelForCausalLM.from_config(make_config(case)))
        expected[case] = logits(model)
        with tempfile.TemporaryDirectory() as saved:
            save_teacher(model, tokenizer, saved)
            (folder / case).mkdir(parents=True)
            shutil.copy(Path(saved, "config.json"), folder / case)
    model = filled(AutoModelForCausalLM.from_config(make_config("llama")))
    save_teacher(model, tokenizer, folder / "whole")
    model.save_pretrained(folder / "foreign")
    tokenizer.save_pretrained(folder / "foreign")
    (folder / "foreign" / "model.safetensors").unlink()  # that of `whole`
    model.name_or_path = "whole"
    adapted = make_adapter(model)
    expected["adapter"] = logits(adapted)
    save_teacher(adapted, tokenizer, folder / "adapter")
    (folder / "adapter" / "README.md").unlink()
    expected["tokens"] = torch.tensor(tokenizer(TEXTS, padding=True)["input_ids"])
    save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
    freeze(TEACHERS / ".".join(transformers.__version__.split(".")[:2]))
