"""What all tests share: no Hub, few threads, one toy tokenizer, and markers that say what a test is."""

import datetime
import gc
import os
import sys
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
gc.set_threshold(50_000, 20, 50)  # tracing makes millions of objects: a seventh of an export's time went into this
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# With shapes that are free, to make a tensor from what this cache remembers takes longer than to run the operator.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")
# OpenVINO and NNCF report each call from a process that they fork for it; without this module they do not.
sys.modules["openvino_telemetry"] = None
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores; what they start inherits it
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import huggingface_hub  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import traced_once  # noqa: E402, F401
from lost_processes import (  # noqa: E402, F401
    pytest_handlecrashitem,
    pytest_report_teststatus,
    pytest_terminal_summary,
    pytest_xdist_make_scheduler,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402


TESTS = Path(__file__).parent
QUICK = ("invariants", "model", "unit")  # folders; of what is in them, all that has no marker of another kind
OTHER_KINDS = {"browser", "export", "process", "slow", "wheel"}

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# Files that take a minute and more, longest first: one that begins last would keep a core waiting for it.
LONGEST = ("test_targets", "test_code_blocks", "test_optimum_onnx", "test_parity", "test_quickstart", "test_examples")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder == "export":
            item.add_marker("export")
        if folder in QUICK and OTHER_KINDS.isdisjoint(mark.name for mark in item.iter_markers()):
            item.add_marker("quick")


started = []  # processes of Python, by the test that runs


def note_process(event, details):
    if event != "subprocess.Popen" or "_inductor" in str(details[1]):  # torch's own, at the first compilation of all
        return
    if Path(os.fsdecode(details[0])).name.startswith("python"):
        started.append(details[1])


sys.addaudithook(note_process)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    started.clear()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    result = yield
    if started and item.get_closest_marker("quick"):
        pytest.fail(f"it starts {started[0]}: mark it with @pytest.mark.process")
    return result


@pytest.fixture(autouse=True, scope="module")
def _no_garbage_is_looked_for_in_imports():
    # Each training collects garbage, and would look through the millions of objects of all that is imported by then.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_accelerate_settings():
    # transformers 4.57 writes precision and compilation of one TrainingArguments there, for all that follow to take.
    before = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def today(monkeypatch):
    """`today("2026-11-28")` makes it midnight of that day for chat templates and for what freezes them."""
    from transformers.utils import chat_template_utils

    from hf_encdec_distill.models import prompts

    def set_clock(day):
        class Date(datetime.date):
            today = classmethod(lambda cls: cls.fromisoformat(day))

        class Now(datetime.datetime):
            now = classmethod(lambda cls: cls.fromisoformat(day))

        monkeypatch.setattr(prompts, "date", Date)
        monkeypatch.setattr(chat_template_utils, "datetime", Now)

    return set_clock


@pytest.fixture
def forget_sessions():
    """Lets the client look again whether it is offline."""
    forget = getattr(huggingface_hub, "close_session", None) or huggingface_hub.utils.reset_sessions
    yield forget
    forget()


@pytest.fixture
def image_tokenizer(make_bpe_tokenizer):
    """One without a chat template that knows `<image>`."""
    tokenizer = make_bpe_tokenizer(chat_template=None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


@pytest.fixture(scope="session")
def make_bpe_tokenizer():
    """Byte-level BPE of at most 280 tokens, with a BOS that it puts in front (or not) and a chat template (or not)."""

    def make(add_bos=False, chat_template=CHAT_TEMPLATE, pad_token="<|im_end|>"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=280,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(["def add(a, b): return a + b", "Return the sum of two numbers."] * 4, trainer)
        if add_bos:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<s>",
            eos_token="<|im_end|>",
            pad_token=pad_token,
            chat_template=chat_template,
            clean_up_tokenization_spaces=False,
        )

    return make


@pytest.fixture
def tokenizer(make_bpe_tokenizer):
    return make_bpe_tokenizer(pad_token="<|endoftext|>")


@pytest.fixture
def own_datasets_cache(tmp_path, monkeypatch):
    """`datasets` keeps what it has read of a file, and finds it again by name and time."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
