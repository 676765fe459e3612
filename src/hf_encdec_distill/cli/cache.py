"""Record a teacher's distribution at each target of a dataset; `distill --teacher FOLDER` then needs no teacher.

Rows that are already in the folder are not captured again: the same command continues after an interruption, and adds
the rows of another dataset. Template and length limits have to match those of the training. Under `accelerate launch`
the processes share the rows. Independent jobs share them with --shard 0/8 to --shard 7/8, into one folder, into one
dataset on the Hub (--push-to-hub), or into folders of their own that --merge makes one.

With --server URL the model at that address is asked, and of TEACHER only the configuration and the tokenizer are read,
which has to be the server's. Its API key comes from the environment variable HF_ENCDEC_TEACHER_API_KEY.

With --generate the teacher writes the targets itself. The folder keeps them too:
`distill --teacher FOLDER --dataset FOLDER` trains on them.

With --generate --server URL the teacher is on a server, also one that gives no distributions: TEACHER is the model's
name there. `distill --teacher FOLDER --dataset FOLDER --distill-weight 0` trains on what it writes.

With --encoder-states STUDENT the folder gets what the student's encoder computes of each prompt, in place of the
teacher's predictions: `distill STUDENT --freeze-encoder --encoder-states FOLDER` then never runs the encoder. Of the
teacher, only the tokenizer is read.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._display import say_result
from ._inputs import (
    BUILT_IN,
    add_data_arguments,
    add_prompt_arguments,
    check_at_least_one,
    load_splits,
    prompt_template,
    refuse,
    refuse_of_other_kinds,
    teacher_path,
)


if TYPE_CHECKING:
    from datasets import DatasetDict

    from ..distillation import LiveTeacher, ServedTeacher, TargetGeneration

SUMMARY = "record a teacher once, then train without it"
EXAMPLE = "hf-encdec-distill cache built-in --output teacher-cache --kind top_k --k 32"
INTERRUPTED = "interrupted; the same command goes on from the rows that are recorded"

# The fields of `TargetGeneration`, which has their defaults, but for the limit: that is the targets'.
_GENERATION = {
    "num_beams": (int, "N", "number of beams (default: 1, greedy)"),
    "sampling_temperature": (float, "T", "sample the answers at this temperature instead"),
    "num_return_sequences": (int, "N", "answers per row to choose from (default: 1)"),
    "keep": (
        str,
        "{likeliest,closest,all}",
        "likeliest to the teacher, closest to the reference (ROUGE-L, chrF), or all (default: likeliest)",
    ),
    "seed": (int, "N", "seed of the sampling (default: 0)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    teacher = parser.add_mutually_exclusive_group(required=True)
    text = f"causal language model or PEFT adapter: folder, Hub id, or {BUILT_IN!r}"
    teacher.add_argument("teacher", nargs="?", help=text)
    teacher.add_argument("--teacher", dest="teacher_option", metavar="TEACHER", help="the same, as an option")
    teacher.add_argument(
        "--merge", nargs="+", metavar="FOLDER", help="no teacher: put caches of several jobs into one, as they are"
    )
    parser.add_argument("--output", "--out", required=True, metavar="FOLDER", help="new folder, or a cache to extend")
    parser.add_argument(
        "--kind",
        choices=("top_k", "sampled", "dense"),
        default="top_k",
        help="the most likely tokens and the mass of all others; tokens drawn from the distribution (unbiased, "
        "forward KL only); or the whole distribution (default: %(default)s)",
    )
    parser.add_argument(
        "--k", type=int, default=32, metavar="N", help="tokens that top_k keeps per target (default: 32)"
    )
    parser.add_argument(
        "--rounds", type=int, default=50, metavar="N", help="tokens that sampled draws per target (default: 50)"
    )
    parser.add_argument(
        "--proposal-power",
        type=float,
        default=1.0,
        metavar="T",
        help="sampled draws from the probabilities raised to this power; below 1, rare tokens come more often "
        "(default: 1)",
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="distill_temperature of the training (default: 1)"
    )
    parser.add_argument(
        "--vocab-policy",
        default="mask_padding",
        metavar="POLICY",
        help="vocab_policy of the training; id_map and universal need --student (default: %(default)s)",
    )
    parser.add_argument(
        "--student",
        metavar="FOLDER",
        help="the student, whose tokenizer splits the targets; a merged student also gives its start token if there "
        "is no prompt template and no chat template",
    )
    parser.add_argument(
        "--teacher-dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="default: bfloat16 if the hardware supports it, else float32",
    )
    parser.add_argument(
        "--teacher-quantization", choices=("8bit", "4bit"), help="load the teacher quantized, with bitsandbytes"
    )
    server = parser.add_argument_group("a teacher on a server of vLLM, SGLang or llama.cpp")
    server.add_argument("--server", metavar="URL", help="ask the model there, for instance http://localhost:8000")
    server.add_argument("--server-model", metavar="NAME", help="its name, on a server of several models")
    server.add_argument(
        "--requests",
        type=int,
        default=32,
        metavar="N",
        help="rows that are asked about at once (default: %(default)s)",
    )
    add_data_arguments(parser)
    parser.add_argument(
        "--splits", nargs="+", default=["train", "validation"], metavar="NAME", help="default: train validation"
    )
    add_prompt_arguments(parser)
    parser.add_argument(
        "--prompt-date",
        metavar="YYYY-MM-DD",
        help="the date for a chat template that contains one (default: that of --student, that of the cache to "
        "extend, today)",
    )
    parser.add_argument(
        "--encoder-states",
        metavar="STUDENT",
        help="record the states of this student's encoder, for a training with --freeze-encoder and --encoder-states",
    )
    parser.add_argument(
        "--mixed-precision",
        choices=("no", "bf16", "fp16"),
        default="no",
        help="with --encoder-states: bf16 for a training with --bf16, fp16 for --fp16 (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows per batch (default: %(default)s)")
    parser.add_argument(
        "--shard",
        metavar="INDEX/NUM",
        help="capture only this shard of the rows, 0/8 to 7/8 for eight jobs; --push-to-hub adds it to the others",
    )
    parser.add_argument("--push-to-hub", metavar="USER/NAME", help="upload the cache as a dataset")
    parser.add_argument("--private", action="store_true", help="create a private dataset")
    generation = parser.add_argument_group("sequence-level distillation")
    generation.add_argument(
        "--generate",
        action="store_true",
        help="let the teacher write the targets, up to --max-target-length tokens (default: 128)",
    )
    for name, (kind, metavar, text) in _GENERATION.items():
        option = f"--{name.replace('_', '-')}"
        generation.add_argument(option, type=kind, default=argparse.SUPPRESS, metavar=metavar, help=text)


def run(args: argparse.Namespace) -> None:
    from accelerate import PartialState

    from ..distillation.alignment.vocabularies import check_vocab_policy
    from ..distillation.teachers.capture import capture
    from ..models.families import merged_start_token_id
    from ..models.loading import load_config, load_tokenizer

    if not args.push_to_hub:
        refuse(args, "private", reason="without --push-to-hub: give both, or neither")
    if args.merge is not None:
        return _merge(args)
    if args.encoder_states is not None:
        return _record_encoder_states(args)
    refuse(args, "mixed_precision", reason="without --encoder-states: give both, or neither")
    if args.server is None:
        refuse(args, "requests", "server_model", reason="without --server: give both, or neither")
    if args.server is not None and args.generate:
        return _write_on_server(args)
    refuse_of_other_kinds(args)
    check_vocab_policy(args.vocab_policy)
    check_at_least_one(args, "max_source_length", "max_target_length")
    index, num_shards = _shard(args.shard)
    generation = _generation(args)
    splits = _splits(args)
    path = teacher_path(args.teacher or args.teacher_option)
    tokenizer = load_tokenizer(path)
    student = load_config(args.student) if args.student else None
    state = PartialState()  # gives each process a device of its own
    captured = capture(
        _teacher(args, path, tokenizer),
        splits,
        args.output,
        tokenizer,
        kind=args.kind,
        k=args.k,
        rounds=args.rounds,
        proposal_power=args.proposal_power,
        temperature=args.temperature,
        student_tokenizer=load_tokenizer(args.student) if args.student else None,
        vocab_policy=args.vocab_policy,
        generation=generation,
        num_shards=num_shards,
        index=index,
        batch_size=args.batch_size,
        prompt_template=prompt_template(args.prompt_template, args.dataset),
        max_source_length=args.max_source_length,
        max_target_length=args.max_target_length,
        prompt_date=args.prompt_date or getattr(student, "prompt_date", None),
        start_token_id=merged_start_token_id(student),
    )
    if state.is_main_process:
        _report(args, captured)


# Options that say what is recorded of a teacher, and how.
_OF_A_RECORD = (
    *("kind", "k", "rounds", "proposal_power", "temperature", "student", "teacher_dtype", "teacher_quantization"),
)
_OF_A_CAPTURE = (*_OF_A_RECORD, "generate", "shard", "server", "server_model", "requests")
_OF_ROWS = (
    *("dataset", "source_column", "target_column", "splits", "prompt_template", "prompt_date", "vocab_policy"),
    *("max_source_length", "max_target_length", "batch_size"),
)


def _merge(args: argparse.Namespace) -> None:
    from ..distillation.teachers.workers import merge_caches

    reason = "with --merge, which captures nothing: leave one out"
    refuse(args, *_OF_A_CAPTURE, *_OF_ROWS, "encoder_states", "mixed_precision", reason=reason)
    _generation(args)
    merge_caches(args.merge, args.output)
    _report(args)


def _write_on_server(args: argparse.Namespace) -> None:
    from accelerate import PartialState

    from ..distillation.teachers.served_targets import write_targets

    reason = "with --generate --server, which records texts and no distributions: leave one out"
    refuse(args, *_OF_A_RECORD, "vocab_policy", reason=reason)
    reason = "with --generate --server, where the server makes the prompts, and cuts none: leave it out"
    refuse(args, "prompt_date", "max_source_length", reason=reason)
    refuse(args, "batch_size", reason="with --generate --server: give --requests instead")
    check_at_least_one(args, "max_target_length", "requests")
    index, num_shards = _shard(args.shard)
    generation = _generation(args)
    assert generation is not None, "it was asked for with --generate"
    written = write_targets(
        args.server,
        _splits(args),
        args.output,
        generation,
        model=args.server_model or args.teacher or args.teacher_option,
        requests=args.requests,
        prompt_template=prompt_template(args.prompt_template, args.dataset),
        num_shards=num_shards,
        index=index,
    )
    if PartialState().is_main_process:
        _report(args, written)


def _report(args: argparse.Namespace, captured: int | None = None) -> None:
    """What the folder holds, and where it was uploaded to."""
    from ..distillation.teachers.cache_hub import push
    from ..distillation.teachers.recorded import SHARD, TARGETS, read_manifest, size_on_disk
    from ..distillation.teachers.shards import count_keys
    from ..distillation.teachers.targets import GENERATED
    from ..distillation.teachers.workers import add_to_hub

    folder, size = Path(args.output), size_on_disk(args.output)
    content = {"output": args.output, "bytes": size}
    text = f"{size / 1e6:.1f} MB"
    if args.shard is None:  # one job of many does not read what the others wrote
        targets_only = read_manifest(folder)["kind"] == TARGETS
        rows, repeated = count_keys(folder, GENERATED if targets_only else SHARD)
        content |= {"rows": rows, "repeated_rows": repeated}
        text = f"{rows} in the cache, {text}"
        if repeated:
            text += f"; {repeated} rows were captured by more than one job, which only takes space"
    if captured is not None:
        content["captured_rows"] = captured
        text = f"{captured} rows captured, {text}"
    text = f"{args.output}: {text}"
    if args.push_to_hub is not None:
        upload = push if args.shard is None else add_to_hub
        content["url"] = upload(folder, args.push_to_hub, args.private or None)
        text += f"\n{content['url']}"
    say_result(args, content, text)


def _shard(given: str | None) -> tuple[int, int]:
    """`INDEX/NUM` -> both; all rows are shard 0 of 1."""
    index, _, num_shards = ("0/1" if given is None else given).partition("/")
    if not (index.isdecimal() and num_shards.isdecimal()):
        raise ValueError(
            f"--shard {given}: give INDEX/NUM, such as 0/8 for the first of eight jobs and 7/8 for the last"
        )
    return int(index), int(num_shards)


def _teacher(args: argparse.Namespace, path: str, tokenizer: Any) -> LiveTeacher | ServedTeacher:
    from ..devices import device, working_dtype
    from ..distillation.alignment.vocabularies import vocab_size
    from ..distillation.teachers.live import LiveTeacher
    from ..distillation.teachers.served import ServedTeacher
    from ..models.loading import load_config

    if args.server is None:
        dtype = args.teacher_dtype or str(working_dtype()).removeprefix("torch.")
        return LiveTeacher.load(path, dtype, args.teacher_quantization).to(device())
    refuse(args, "teacher_dtype", "teacher_quantization", reason="with --server, which decides that: leave one out")
    options = {"k": args.k, "model": args.server_model, "requests": args.requests}
    return ServedTeacher(args.server, tokenizer, vocab_size=vocab_size(load_config(path)), **options)


def _record_encoder_states(args: argparse.Namespace) -> None:
    from accelerate import Accelerator

    from ..devices import device
    from ..distillation import DistillationCollator
    from ..distillation.alignment.vocabularies import SharedVocabulary, check_vocab_policy
    from ..distillation.collator import tokenizer_of
    from ..distillation.options.encoder_states import capture_encoder_states
    from ..distillation.teachers.recorded import is_cache, local_cache, recorded_prompt_date
    from ..models.families import merged_start_token_id
    from ..models.loading import load_tokenizer
    from ..models.prompts import frozen_prompt_date
    from .distill import student_and_tokenizer

    check_vocab_policy(args.vocab_policy)
    check_at_least_one(args, "batch_size", "max_source_length", "max_target_length")
    reason = "with --encoder-states, which records no teacher: leave one out"
    refuse(args, *_OF_A_CAPTURE, "push_to_hub", reason=reason)
    _generation(args)
    splits = _splits(args)
    path = teacher_path(args.teacher or args.teacher_option)
    path = str(local_cache(path)) if is_cache(path) else path
    student, own = student_and_tokenizer(args.encoder_states)
    tokenizer = tokenizer_of(own)
    teacher_tokenizer = load_tokenizer(path)
    template = prompt_template(args.prompt_template, args.dataset)
    # As the trainer decides it.
    day = args.prompt_date or getattr(student.config, "prompt_date", None)
    day = day or (recorded_prompt_date(path) if is_cache(path) else None)
    ours, theirs = (1 + max(each.get_vocab().values()) for each in (tokenizer, teacher_tokenizer))
    vocabulary = SharedVocabulary.between(ours, theirs, tokenizer, teacher_tokenizer, args.vocab_policy)
    collator = DistillationCollator(
        tokenizer,
        teacher_tokenizer,
        prompt_template=template,
        prompt_date=frozen_prompt_date(teacher_tokenizer, template, day),
        max_source_length=args.max_source_length,
        max_target_length=args.max_target_length,
        start_token_id=merged_start_token_id(student.config),
        vocabulary=vocabulary,
    )
    accelerator = Accelerator(mixed_precision=args.mixed_precision)  # gives each process a device of its own
    rows = capture_encoder_states(
        student.to(device()),
        splits,
        args.output,
        collator,
        batch_size=args.batch_size,
        accelerator=accelerator,
    )
    if accelerator.is_main_process:
        size = sum(file.stat().st_size for file in Path(args.output).rglob("*.safetensors"))
        text = f"{args.output}: the encoder's states of {rows} rows, {size / 1e6:.1f} MB"
        say_result(args, {"output": args.output, "rows": rows, "bytes": size}, text)


def _splits(args: argparse.Namespace) -> DatasetDict:
    from datasets import DatasetDict

    splits = load_splits(args.dataset, args.source_column, args.target_column, train=False)
    unknown = [name for name in args.splits if name not in splits]
    if unknown:
        raise ValueError(f"--splits {unknown[0]}: the data has {', '.join(splits)}")
    return DatasetDict({name: splits[name] for name in args.splits})


def _generation(args: argparse.Namespace) -> TargetGeneration | None:
    from ..distillation import TargetGeneration

    given = {name: getattr(args, name) for name in _GENERATION if hasattr(args, name)}
    if args.generate:
        if args.max_target_length is not None:
            given["max_new_tokens"] = args.max_target_length
        return TargetGeneration(**given)
    if given:
        raise ValueError(f"--{next(iter(given)).replace('_', '-')} says how targets are written: give --generate too")
    return None
