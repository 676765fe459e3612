"""ONNX Runtime GenAI: a `merged` student as a pipeline of two graphs, for C++, C#, Java, Objective-C and Python.

A `merged` decoder is a decoder-only model whose cache begins with the prompt. GenAI's model type `decoder-pipeline`
runs `prompt_model.onnx` on the first tokens, the prompt and the start token: the encoder reads all but the last one,
at which the decoder takes its first step, and both leave their keys and values in GenAI's cache. From then on
`decoder_model.onnx` takes a token at a time, and reads and writes that cache in place.

What GenAI does with them is in onnxruntime-genai at a0c04eb (0.16.0-dev), `src/models/`: `decoder_only_pipeline.cpp`
for which graph runs, `kv_cache.cpp` for the cache, `logits.cpp` for logits of one position. Run with 0.18.0.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import check_fields, read_json, write_json
from .backends import Backend, child_environment, register_backend
from .graphs import GraphCache, Graphs, threads
from .onnx import write_graphs
from .recipe import Graph, Port, Shapes


logger = logging.getLogger(__name__)

CONFIG = "genai_config.json"
TOKENIZER = "genai_tokenizer"
_FILES = {"prompt": "prompt_model.onnx", "decoder": "decoder_model.onnx"}
# All that `_config` writes; a folder that anybody may have written has no more.
_SESSION = {"log_id": "onnxruntime-genai", "provider_options": []}
_OF_MODEL = {
    *("type", "bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "context_length", "decoder"),
    "tokenizer_dir",
}
_OF_DECODER = {
    *("session_options", "hidden_size", "head_size", "num_attention_heads", "num_key_value_heads"),
    *("num_hidden_layers", "inputs", "outputs", "pipeline"),
}
_OF_STAGE = {"filename", "inputs", "outputs", "run_on_prompt", "run_on_token_gen"}
_SLOTS = 2048  # for tokens of prompt and answer, in an app that does not say how many
_ANSWER = 1024  # target tokens that `GenAiGraphs` has slots for; GenAI writes to all of them before the first token
# On these GenAI's tokenizer has to agree with the student's.
_PROBES = (
    "def f(x):\n    return x + 1",
    "The quick brown fox.",
    "a",
    "42 ways, 3.5%",
    'Zoé, 日本  "it\'s" \\n {{ x }}',
)


@register_backend
class GenAiBackend(Backend):
    name = "genai"
    label = "ONNX Runtime GenAI"
    runtime = "ONNX Runtime GenAI"
    packages = ("onnxruntime_genai", "onnxruntime", "onnx", "onnxscript")
    variants = ("fp32", "fp16", "int8", "int4")
    files = ("*.onnx", "*.onnx_data", CONFIG, f"{TOKENIZER}/*")

    def settle(
        self, config, variant: str, shapes: Shapes, stateful: bool | None, options: Mapping[str, Any]
    ) -> tuple[Shapes, bool]:
        """
        Raises:
            ValueError: the student has a cross-attention of its own, a RoPE that is ruled by the longest sequence of a
                call, or heads that ONNX Runtime's attention does not take; or shapes are fixed, or states asked for.
        """
        if config.cross_attention != "merged":
            raise ValueError(
                f"cross_attention={config.cross_attention!r}: genai runs students of cross_attention='merged', whose "
                "decoder is a decoder-only model with a cache; for others choose onnx, openvino or coreml"
            )
        if config.encoder_pooling > 1:
            raise ValueError(
                f"encoder_pooling={config.encoder_pooling}: genai gives the prompt's keys and values a place for each "
                "of its tokens; choose onnx, openvino or coreml"
            )
        from ..models.families import RULED_BY_LENGTH

        rope_type = config.rope_parameters["rope_type"]
        if rope_type in RULED_BY_LENGTH:
            raise ValueError(
                f"rope_type={rope_type!r} chooses its frequencies by the longest sequence of a call, and genai makes "
                "one for each token: choose onnx or openvino"
            )
        if config.head_dim % 8:
            raise ValueError(
                f"head_dim={config.head_dim}: ONNX Runtime's GroupQueryAttention takes multiples of 8; choose onnx, "
                "openvino or coreml"
            )
        if shapes.targets is not None:
            raise ValueError(f"shapes {shapes}: genai takes dynamic; for fixed ones choose onnx, openvino or coreml")
        if stateful:
            raise ValueError("GenAI holds keys and values itself: leave stateful out, or choose openvino or coreml")
        return shapes, False

    def cache_dtype(self, variant: str) -> str:
        return "float16" if variant == "fp16" else "float32"

    def export(
        self,
        model,
        graphs: Mapping[str, Graph],
        shapes: Shapes,
        variant: str,
        stateful: bool,
        folder: Path,
        license: str,
        options: Mapping[str, Any],
    ) -> None:
        from .genai_stages import EXAMPLE_SIZES, DecoderStage, PromptStage
        from .tracing import program_of

        if variant == "fp16":
            model = copy.deepcopy(model).half()
        stages = _stages(model.config)
        modules = {"prompt": PromptStage(model), "decoder": DecoderStage(model)}
        programs = {
            name: program_of(modules[name], graph, EXAMPLE_SIZES, model.dtype) for name, graph in stages.items()
        }
        write_graphs(programs, stages, _FILES, variant, license, folder)
        write_json(folder / CONFIG, _config(model, stages))

    def write_tokenizer(self, tokenizer, model, folder: Path) -> None:
        """The tokenizer for GenAI, which runs no post-processor: what the student's puts around a source is in a chat
        template here, with the start token behind it. Left out, with a warning, where GenAI would not read a prompt as
        the student does."""
        own = folder / TOKENIZER
        own.mkdir()
        if (folder / "tokenizer.json").is_file():  # a slow tokenizer has none, and GenAI does not read it
            shutil.copy(folder / "tokenizer.json", own)
        settings = read_json(folder / "tokenizer_config.json")
        settings["chat_template"] = _chat_template(tokenizer, model.config.decoder_start_token_id)
        write_json(own / "tokenizer_config.json", settings)
        config = read_json(folder / CONFIG)
        config["model"]["tokenizer_dir"] = TOKENIZER
        write_json(folder / CONFIG, config)
        difference = _difference(tokenizer, model.config.decoder_start_token_id, folder)
        if difference:
            logger.warning(
                "ONNX Runtime GenAI cannot make this student's prompts from text (%s). The graphs are not concerned: "
                "give a generator token ids, those of the student's tokenizer and decoder_start_token_id behind them.",
                difference,
            )
            shutil.rmtree(own)
            del config["model"]["tokenizer_dir"]
            write_json(folder / CONFIG, config)

    def load(self, folder: Path, graphs: Mapping[str, Graph], shapes: Shapes, dtype, stateful: bool) -> GenAiGraphs:
        return GenAiGraphs(folder, graphs, shapes, dtype)

    def devices(self) -> list[str]:
        import onnxruntime_genai

        others = {"CUDA": "cuda", "DirectML": "dml", "OpenVINO": "openvino", "QNN": "qnn"}
        available = (name for name, short in others.items() if getattr(onnxruntime_genai, f"is_{short}_available")())
        return ["CPU", *available]


def _stages(config) -> dict[str, Graph]:
    """The two graphs, under GenAI's names. Batch 1: with more rows GenAI would take every step for a prompt."""
    heads, width, layers = config.num_key_value_heads, config.head_dim, range(config.decoder_num_hidden_layers)

    def cache(prefix: str) -> tuple[Port, ...]:
        names = (f"{prefix}.{layer}.{side}" for layer in layers for side in ("key", "value"))
        return tuple(Port(name, (1, heads, "slots", width)) for name in names)

    past, present = cache("past_key_values"), cache("present")
    outputs = (Port("logits", (1, 1, config.vocab_size)), *present)
    return {
        "prompt": Graph((Port("input_ids", (1, "prompt + 1"), "int64"), past[0]), outputs),
        "decoder": Graph(
            (Port("input_ids", (1, 1), "int64"), Port("attention_mask", (1, "past + 1"), "int64"), *past),
            outputs,
        ),
    }


def _config(model, stages: Mapping[str, Graph]) -> dict[str, Any]:
    """`genai_config.json`."""
    config, generation = model.config, model.generation_config
    ends = generation.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    pad = generation.pad_token_id if generation.pad_token_id is not None else config.pad_token_id
    stage = {
        name: {
            "filename": _FILES[name],
            "inputs": [port.name for port in graph.inputs],
            "outputs": [port.name for port in graph.outputs],
            "run_on_prompt": name == "prompt",
            "run_on_token_gen": name == "decoder",
        }
        for name, graph in stages.items()
    }
    return {
        "model": {
            "type": "decoder-pipeline",
            "bos_token_id": config.decoder_start_token_id,
            "eos_token_id": ends,
            "pad_token_id": pad if pad is not None else next(iter(ends), 0),
            "vocab_size": config.vocab_size,
            "context_length": config.max_position_embeddings,
            "decoder": {
                "session_options": _SESSION,
                "hidden_size": config.hidden_size,
                "head_size": config.head_dim,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": config.num_key_value_heads,
                "num_hidden_layers": config.decoder_num_hidden_layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "pipeline": [stage],
            },
        },
        "search": {
            "do_sample": False,
            "max_length": min(config.max_position_embeddings, _SLOTS),
            "num_beams": 1,
            "past_present_share_buffer": True,
        },
    }


def _check_config(folder: Path) -> None:
    """Raises ValueError where `genai_config.json` has what `_config` does not write: GenAI would load libraries and
    write files that it names."""
    file = folder / CONFIG
    model = read_json(file, fields={"model": dict})["model"]
    check_fields(model, {"decoder": dict, "context_length": int}, f"{file}, model")
    decoder = model["decoder"]
    check_fields(decoder, {"pipeline": list}, f"{file}, decoder")
    surplus = [*(model.keys() - _OF_MODEL), *(decoder.keys() - _OF_DECODER)]
    for entry in decoder["pipeline"]:
        for name, stage in entry.items() if isinstance(entry, dict) else [(str(entry), {})]:
            right = isinstance(stage, dict) and stage.keys() <= _OF_STAGE and stage.get("filename") == _FILES.get(name)
            surplus += [] if right else [name]
    if model.get("tokenizer_dir", TOKENIZER) != TOKENIZER:
        surplus.append("tokenizer_dir")
    if decoder.get("session_options") != _SESSION:
        surplus.append("session_options")
    if surplus:
        raise ValueError(f"{file} has a {sorted(surplus)[0]} that no export writes: export the model again")


def _chat_template(tokenizer, start: int) -> str:
    """The student's prompt and the start token around the last message, as Jinja."""
    bare, whole = (tokenizer(_PROBES[0], add_special_tokens=special)["input_ids"] for special in (False, True))
    begin = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    before, after = (
        json.dumps(tokenizer.decode(ids, clean_up_tokenization_spaces=False), ensure_ascii=False)
        for ids in (whole[:begin], [*whole[begin + len(bare) :], start])
    )
    return f"{{{{ {before} }}}}{{{{ messages[-1]['content'] }}}}{{{{ {after} }}}}"


# GenAI's tokenizer ends the process where some kinds of tokenizer.json confuse it (a WordPiece, 0.18.0).
_READ_PROBES = """
import json, sys, onnxruntime_genai
tokenizer = onnxruntime_genai.Tokenizer(sys.argv[1])
for probe in json.load(sys.stdin):
    text = tokenizer.apply_chat_template(json.dumps([{"role": "user", "content": probe}]))
    print(tokenizer.encode(text).tolist())
"""


def _difference(tokenizer, start: int, folder: Path) -> str | None:
    """A word on how GenAI's tokenizer in `folder` differs from the student's, if it does."""
    command = [sys.executable, "-c", _READ_PROBES, str(folder)]
    run = subprocess.run(
        command,
        input=json.dumps(_PROBES),
        env=child_environment(),
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if run.returncode:
        said = run.stderr.strip().splitlines()
        return said[-1] if said else f"its process ended with exit code {run.returncode}"
    for probe, found in zip(_PROBES, map(json.loads, run.stdout.splitlines()), strict=True):
        expected = [*tokenizer(probe)["input_ids"], start]
        if found != expected:
            return f"{probe!r} becomes {found}, not {expected}"
    return None


class _Answer:
    """The tokens of one answer, and the generator that has read them; `None` if none has yet."""

    def __init__(self, tokens: Sequence[int] = (), generator=None):
        self.tokens, self.generator = list(tokens), generator


class _Answers(GraphCache):
    """An answer for each row, whose keys and values are inside its generator."""

    def __init__(self, batch: int):
        super().__init__([])
        self.answers = [_Answer() for _ in range(batch)]

    def reorder_cache(self, beam_idx) -> None:
        """The first beam that goes on from another takes its generator; those after it read the tokens again."""
        chosen = [self.answers[index] for index in np.asarray(beam_idx)]
        self.answers = []
        for answer in chosen:
            self.answers.append(_Answer(answer.tokens, answer.generator))
            answer.generator = None


class GenAiGraphs(Graphs):
    """An exported folder on ONNX Runtime GenAI: a generator for each row, which is given tokens instead of choosing
    them."""

    def __init__(self, folder: Path, graphs: Mapping[str, Graph], shapes: Shapes, dtype):
        super().__init__(graphs, shapes, dtype)
        import onnxruntime_genai

        _check_config(folder)
        config = onnxruntime_genai.Config(str(folder))
        # Threads that spin when their work is done take the time of other pools.
        session = {"session_options": {"intra_op_num_threads": threads(), "session.intra_op.allow_spinning": "0"}}
        config.overlay(json.dumps({"model": {"decoder": session}}))
        self.model = onnxruntime_genai.Model(config)
        self.longest = read_json(folder / CONFIG)["model"]["context_length"]

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        raise NotImplementedError("GenAI runs its graphs itself")

    def encode(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, pixel_values: np.ndarray | None = None
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Ids `(B, S)` and mask as they are: GenAI reads a prompt together with the first target token."""
        self._features_of_rows(input_ids, pixel_values)  # refuses any
        return [input_ids], attention_mask

    def room_for_target(self, prompt: int) -> int:
        return min(_ANSWER, self.longest - prompt)

    def new_cache(self, batch: int) -> GraphCache:
        return _Answers(batch)

    def decode(
        self, input_ids: np.ndarray, encoder_mask: np.ndarray, cross: Sequence[np.ndarray], cache: GraphCache
    ) -> np.ndarray:
        """As in [`Graphs`].

        Raises:
            ValueError: a prompt has no token, or prompt and answer have more than the student has positions.
        """
        assert isinstance(cache, _Answers)
        prompts = [ids[mask > 0].tolist() for ids, mask in zip(cross[0], encoder_mask, strict=True)]
        cache.length += input_ids.shape[1]
        for prompt in prompts:
            if not prompt or cache.length > self.room_for_target(len(prompt)):
                raise ValueError(
                    f"{len(prompt)} prompt tokens and {cache.length} target tokens: this export takes a prompt of at "
                    f"least 1 token, {self.longest} tokens in all and {_ANSWER} of a target; cut the prompt, or ask "
                    "for fewer with max_new_tokens"
                )
        logits = [
            [self._append(answer, prompt, token) for token in tokens]
            for answer, prompt, tokens in zip(cache.answers, prompts, input_ids.tolist(), strict=True)
        ]
        return np.array(logits, np.float32)

    def _append(self, answer: _Answer, prompt: list[int], token: int) -> np.ndarray:
        """Logits `(V,)` behind `token`, which is then the last of the answer."""
        import onnxruntime_genai

        answer.tokens.append(token)
        unread = [token]
        if answer.generator is None:
            start, *unread = answer.tokens
            settings = onnxruntime_genai.GeneratorParams(self.model)
            settings.set_search_options(max_length=len(prompt) + self.room_for_target(len(prompt)))
            answer.generator = onnxruntime_genai.Generator(self.model, settings)
            answer.generator.append_tokens([*prompt, start])
        for one in unread:
            answer.generator.append_tokens([one])
        return answer.generator.get_logits()[0, 0]
