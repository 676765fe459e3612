"""First-token latency and tokens per second of a student against the decoder-only model it came from.

What keeps the comparison fair:

- both run through the same lean greedy loop (`greedy_decode`), with their key/value caches, in the same dtype, on the
  same threads; `generate()`, whose bookkeeping costs the faster model relatively more, stays out;
- the decoder-only model computes logits at the last prompt position only, as `generate()` does;
- both answer the same prompt with the same number of tokens: no early end of sequence;
- rounds are interleaved (teacher, student, teacher, student, ...) after a warm-up, and the ratio is taken within each
  round, so that a machine that slows down slows both.

Reported are medians with quartiles over the rounds. Batch 1.
"""

import copy
import dataclasses
import importlib.metadata
import inspect
import os
import platform
from collections import Counter
from collections.abc import Iterator, Sequence

import psutil
import torch
import transformers

from .. import __version__
from ..devices import best_cpu_dtype, bf16_unit, cpu_name
from ..metrics.timing import timed
from ..models.families import merged_start_token_id
from ..models.rope_encdec.compat_rope_encdec import CACHE_FIELD
from .contenders import read_by


_PACKAGES = ("accelerate", "datasets", "numpy", "tokenizers", "torch", "transformers")


def machine_description() -> dict:
    """The machine and software that a measurement holds for: the `machine` entry of `metrics.json`.

    `usable_cores` are those that this process may run on, `threads` those that torch uses; `load` is the system's load
    average over the last minute, which tells a quiet machine from a shared one (`None` where the system has none);
    `gpus` is `None` where CUDA sees none.
    """
    cores = os.cpu_count()
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "gpus": _gpus(),
        "cpu": cpu_name(),
        "bf16_unit": bf16_unit(),
        "cores": cores,
        "usable_cores": len(affinity(0)) if affinity else cores,
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def versions() -> dict[str, str]:
    """Of Python, this package and those that a training depends on: for whoever wants to repeat one."""
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "hf-encdec-distill": __version__, **packages}


def _gpus() -> str | None:
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{count} x {name}" for name, count in Counter(names).items()) or None


@torch.inference_mode()
def greedy_decode(model, input_ids: torch.Tensor, new_tokens: int) -> tuple[list[list[int]], list[float]]:
    """Decodes greedily with the model's own cache, to a fixed length, and notes when each token was there.

    Args:
        model: an encoder-decoder or decoder-only model of transformers' forward signature.
        input_ids: `(batch, length)`, no padding: the encoder's input, or the decoder-only prompt.
        new_tokens: tokens to generate; end of sequence does not stop it.

    Returns:
        The token ids of each row, and for each step the seconds since the call, measured when the ids of all rows were
        `int`s in Python.
    """
    return timed(_greedy_steps(model, input_ids, new_tokens))


def _greedy_steps(model, input_ids: torch.Tensor, new_tokens: int) -> Iterator[list[int]]:
    if model.config.is_encoder_decoder:
        fixed = {"encoder_outputs": model.get_encoder()(input_ids=input_ids, return_dict=True)}
        name, first = "decoder_input_ids", {}
        step_ids = input_ids.new_full((len(input_ids), 1), model.config.decoder_start_token_id)
    else:
        # The prompt's last position predicts the first token; logits of the others would be thrown away.
        name, fixed, first, step_ids = "input_ids", {}, {"logits_to_keep": 1}, input_ids
    fixed |= {CACHE_FIELD: None, "use_cache": True, "return_dict": True}
    for _ in range(new_tokens):
        outputs = model(**{name: step_ids}, **fixed, **first)
        fixed[CACHE_FIELD], first = outputs[CACHE_FIELD], {}
        step_ids = outputs.logits[:, -1:].argmax(dim=-1)
        yield step_ids[:, 0].tolist()


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median (`value`) and quartiles (`low`, `high`)."""
    low, value, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    return {"value": value.item(), "low": low.item(), "high": high.item()}


_TIMINGS = ("first_token_ms", "step_ms", "tokens_per_second", "request_ms")


def timings(times: Sequence[float]) -> dict[str, float]:
    """What the times of `greedy_decode` come to, in milliseconds: the first token, a step, the request."""
    step = (times[-1] - times[0]) / (len(times) - 1)
    return dict(zip(_TIMINGS, (1e3 * times[0], 1e3 * step, 1 / step, 1e3 * times[-1]), strict=True))


@dataclasses.dataclass(frozen=True)
class LatencyComparison:
    """What `compare_latency` measured.

    Attributes:
        dtype, dtype_reason: in which both ran, and why that one.
        prompt_length: tokens of the teacher's prompt (mean over the prompts); new_tokens: tokens generated.
        rounds: one dict a round, `{"student": timings, "teacher": timings}`, timings being `first_token_ms`, `step_ms`
            (mean over the round's steps), `tokens_per_second` (1 / step) and `request_ms` (all tokens).
        machine: `machine_description()` when the measurement began.
    """

    dtype: str
    dtype_reason: str
    prompt_length: float
    new_tokens: int
    rounds: list[dict[str, dict[str, float]]]
    machine: dict

    def summary(self, side: str) -> dict[str, dict[str, float]]:
        """Median (`value`) and quartiles (`low`, `high`) of each timing of `"student"` or `"teacher"`."""
        return {name: quartiles([measured[side][name] for measured in self.rounds]) for name in _TIMINGS}

    @property
    def ratio(self) -> dict[str, dict[str, float]]:
        """Student / teacher within each round, then median and quartiles: below 1 the student is faster."""
        return {
            name: quartiles([measured["student"][key] / measured["teacher"][key] for measured in self.rounds])
            for name, key in (("first_token", "first_token_ms"), ("step", "step_ms"), ("request", "request_ms"))
        }

    def to_dict(self) -> dict:
        """The `latency` entry of `metrics.json` (see `hf_encdec_distill.cards.model_card`)."""
        return {
            "dtype": self.dtype,
            "dtype_reason": self.dtype_reason,
            "batch_size": 1,
            "prompt_length": self.prompt_length,
            "new_tokens": self.new_tokens,
            "rounds": len(self.rounds),
            "spread": f"median and quartiles of {len(self.rounds)} interleaved rounds",
            "student": self.summary("student"),
            "teacher": self.summary("teacher"),
            "ratio": self.ratio,
            "measured": self.rounds,
            "machine": self.machine,
        }


def compare_latency(
    student,
    teacher,
    prompts: Sequence[Sequence[int]] | None = None,
    prompt_length: int = 192,
    new_tokens: int = 32,
    rounds: int = 5,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> LatencyComparison:
    """Times the student against the decoder-only teacher with its cache, at batch 1; see the module docstring.

    Args:
        student: an encoder-decoder (a `merged` one reads the prompt without its last token, which is its start token).
        teacher: a decoder-only model that takes `logits_to_keep`.
        prompts: token ids of the teacher's prompts, used in turn, round by round; `None` draws one of `prompt_length`
            random tokens from `seed`.
        new_tokens: tokens generated a round; at least 2.
        rounds: measured rounds; one more, unmeasured, warms up.
        dtype: in which both run; `None` is `best_cpu_dtype()` on a CPU and the student's own elsewhere. A model held
            in another dtype is copied, so that the caller's weights are not rounded.

    Raises:
        ValueError: for lengths or rounds too small, a teacher that cannot keep the head off the prompt, models on
            different devices, or a prompt that does not end in the start token of a `merged` student.
    """
    if new_tokens < 2 or rounds < 1:
        raise ValueError(f"new_tokens={new_tokens}, rounds={rounds}: give at least 2 tokens and 1 round")
    if student.device != teacher.device:
        raise ValueError(f"the student is on {student.device}, the teacher on {teacher.device}: move one to the other")
    if not teacher.config.is_encoder_decoder and "logits_to_keep" not in inspect.signature(teacher.forward).parameters:
        raise ValueError(
            f"{type(teacher).__name__} has no logits_to_keep: it would compute logits at every prompt position, which "
            "no deployment does; compare with a model of transformers that has it"
        )
    prompts = _prompts(student, teacher, prompts, prompt_length, seed)
    dtype, reason = _dtype(student, dtype)
    machine = machine_description()
    models = {"teacher": _ready(teacher, dtype), "student": _ready(student, dtype)}
    measured = []
    for index in range(rounds + 1):
        ids = torch.tensor([prompts[index % len(prompts)]], device=student.device)
        inputs = {"teacher": ids, "student": read_by(student.config, ids)}
        measured.append({side: timings(greedy_decode(models[side], inputs[side], new_tokens)[1]) for side in models})
    return LatencyComparison(
        dtype=str(dtype).removeprefix("torch."),
        dtype_reason=reason,
        prompt_length=sum(map(len, prompts)) / len(prompts),
        new_tokens=new_tokens,
        rounds=measured[1:],
        machine=machine,
    )


def _prompts(student, teacher, prompts, prompt_length: int, seed: int) -> list[list[int]]:
    start = merged_start_token_id(student.config)
    if prompts is None:
        if prompt_length < 2:
            raise ValueError(f"prompt_length={prompt_length}: give at least 2 tokens")
        vocabulary = min(student.config.vocab_size, teacher.config.vocab_size)
        drawn = torch.randint(vocabulary, (prompt_length,), generator=torch.Generator().manual_seed(seed)).tolist()
        return [drawn if start is None else [*drawn[:-1], start]]
    prompts = [list(prompt) for prompt in prompts]
    short = [prompt for prompt in prompts if len(prompt) < 2]
    if not prompts or short:
        raise ValueError(
            f"prompts={prompts if not prompts else short}: give at least one prompt, each of 2 tokens or more"
        )
    ends = sorted({prompt[-1] for prompt in prompts} - {start})
    if start is not None and ends:
        raise ValueError(
            f"a prompt ends in token {ends[0]}, but the merged student starts from token {start}: both have to read "
            "the same prompt, so end it in the student's decoder_start_token_id"
        )
    return prompts


def _dtype(student, dtype: torch.dtype | None) -> tuple[torch.dtype, str]:
    if dtype is not None:
        return dtype, "asked for"
    if student.device.type != "cpu":
        return student.dtype, "the student's own"
    unit = bf16_unit()
    return best_cpu_dtype(), f"this CPU has {unit}" if unit else "this CPU has no bfloat16 unit"


def _ready(model, dtype: torch.dtype):
    """The model in eval mode and `dtype`: a copy, unless it already is both."""
    if model.dtype == dtype and not model.training:
        return model
    model = copy.deepcopy(model).eval()
    for parameter in model.parameters():  # parameters alone: RoPE's frequency buffers stay in float32, as they load
        parameter.data = parameter.data.to(dtype)
    return model
