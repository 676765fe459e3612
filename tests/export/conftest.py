"""Which exports there are to test in an environment, and what several of their tests use."""

import json

import pytest
import torch
import transformers
from packaging.version import Version
from toys import make_config, stir

from hf_encdec_distill import RopeEncDecForConditionalGeneration


# optimum-onnx admits transformers 4.57 at most, optimum-intel 5.5; later ones have exporters of their own. Where a
# lane has one of them, a missing backend is a failure.
collect_ignore = ["test_transformers_exporters.py"]
if Version(transformers.__version__) >= Version("5"):
    collect_ignore = ["test_optimum_onnx.py"]
if Version(transformers.__version__) >= Version("5.6"):
    collect_ignore += ["test_optimum.py", "test_optimum_openvino.py"]

DIGITS = 10
WORDS = [f"w{i}" for i in range(DIGITS)]


@pytest.fixture(scope="session")
def trained():
    """A student that has learnt to say its prompt backwards, and rows of the task.

    Random weights are chaotic: rounded, they answer something else. What quantisation costs shows on trained ones.
    """
    torch.manual_seed(0)
    config = make_config(
        "merged",
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        initializer_range=0.05,
        decoder_start_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = stir(RopeEncDecForConditionalGeneration(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=500)
    for _ in range(500):
        length = int(torch.randint(2, 7, ()))
        prompt = torch.randint(3, 3 + DIGITS, (32, length))
        labels = torch.cat((prompt.flip(1), torch.full((32, 1), 2)), dim=1)
        loss = model(input_ids=prompt, labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert loss < 0.1, "the toy has not learnt its task"
    return model.eval()


@pytest.fixture(scope="session")
def rows():
    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(
            3, 3 + DIGITS, (int(torch.randint(2, 7, (), generator=generator)),), generator=generator
        ).tolist()
        for _ in range(12)
    ]
    return [{"inputs": prompt, "labels": [*prompt[::-1], 2]} for prompt in prompts]


@pytest.fixture(scope="session")
def trained_folder(trained, tmp_path_factory):
    """The same as a person has it: a folder with a tokenizer, and a file of texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {word: 3 + i for i, word in enumerate(WORDS)} | {"<unk>": 13}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("trained")
    trained.save_pretrained(folder / "student")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "student")
    generator = torch.Generator().manual_seed(2)
    with open(folder / "rows.jsonl", "w") as file:
        for _ in range(60):
            words = [WORDS[int(i)] for i in torch.randint(DIGITS, (5,), generator=generator)]
            file.write(json.dumps({"source": " ".join(words), "target": " ".join(words[::-1])}) + "\n")
    return folder
