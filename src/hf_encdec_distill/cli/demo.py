"""Open a page in the browser: type a text, and student and teacher answer side by side. A student that reads images is
also given those that are dropped on it.

Each answer has the time of its first token and its tokens per second. Each token of the student is marked by whether
the teacher, given the answer so far, would choose the same one. The page lets you switch between MODEL and each
--exported. It loads nothing from elsewhere and sends nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import io

from ._display import say_result
from ._inputs import (
    BUILT_IN,
    add_data_arguments,
    check_at_least_one,
    check_free,
    load_test_rows,
    prompt_template,
    public_name,
    teacher_path,
)


SUMMARY = "a page to try a student beside its teacher"
EXAMPLE = "hf-encdec-distill demo runs/quickstart/student --teacher runs/quickstart/work/teacher"
_EXAMPLES = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a student, or an exported folder")
    parser.add_argument("--teacher", help=f"decoder-only model to show beside it: folder, Hub id, or {BUILT_IN!r}")
    parser.add_argument(
        "--exported", action="append", default=[], metavar="DIR", help="an exported folder of the student; repeatable"
    )
    add_data_arguments(parser)
    parser.add_argument(
        "--prompt-template",
        metavar="TEXT",
        help="the teacher's prompt, with {source} in it (default: its chat template); a merged student has its own",
    )
    parser.add_argument(
        "--max-source-length",
        type=int,
        default=256,
        metavar="TOKENS",
        help="of a text, those of images not counted (default: %(default)s)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="TOKENS", help="default: %(default)s")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)"
    )
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")


def run(args: argparse.Namespace) -> None:
    check_at_least_one(args, "max_source_length", "max_new_tokens")
    if importlib.util.find_spec("gradio") is None:
        raise ImportError('the page needs gradio: pip install "hf-encdec-distill[demo-ui]"')
    check_free(args.host, args.port)

    from ._page import launch

    page = load_page(args)
    address = launch(page, args.host, args.port)
    say_result(args, {"url": address}, f"{address} (Ctrl-C ends it)")
    page.block_thread()


def load_page(args: argparse.Namespace):
    """The page, with all that was asked for loaded and warm."""
    from ..devices import device, working_dtype
    from ..models.loading import load_processor, load_teacher, load_tokenizer, reads_images
    from ._answers import ImageReader, Reader, stream
    from ._page import Side, build

    students = {}
    for name in (args.model, *args.exported):
        backend, side = _student(name)
        if backend in students:
            raise ValueError(f"--exported {name} is a second {backend}: give one of them")
        students[backend] = side
        first = students[next(iter(students))]
        if side.tokenizer.get_vocab() != first.tokenizer.get_vocab():
            raise ValueError(f"--exported {name} has another tokenizer than {args.model}: give its own exports")
    teacher = None
    title = public_name(args.model)
    reader: Reader | ImageReader
    if reads_images(first.model.config):
        if args.teacher is not None:
            raise ValueError(
                f"--teacher with {args.model}, which reads images, and a teacher here reads none: leave it out"
            )
        reader = ImageReader(load_processor(args.model), args.max_source_length)
        for side in students.values():
            question = reader.read("a", images=[_blank_image()])
            list(stream(side.model, question.inputs, side.tokenizer, 2, question.images))
        return build(title, students, None, reader, [], max_new_tokens=args.max_new_tokens)
    if args.teacher is not None:
        path = teacher_path(args.teacher)
        model = load_teacher(path, dtype=working_dtype()).to(device())
        teacher = Side(model, load_tokenizer(path), _size(model))
    reader = Reader(
        first.tokenizer,
        first.model.config,
        teacher and teacher.model,
        teacher and teacher.tokenizer,
        prompt_template(args.prompt_template, args.dataset),
        args.max_source_length,
    )
    rows = load_test_rows(args)
    examples = rows.shuffle(seed=0).select(range(min(_EXAMPLES, len(rows))))["source"]

    for side in students.values():  # what a first call prepares is no part of a time
        list(stream(side.model, reader.read(examples[0], side.most_prompt).inputs, side.tokenizer, 2))
    if teacher is not None:
        list(stream(teacher.model, reader.read(examples[0]).prompt, teacher.tokenizer, 2))
    title += f" beside {public_name(args.teacher)}" if teacher else ""
    return build(title, students, teacher, reader, list(examples), max_new_tokens=args.max_new_tokens)


def _student(name: str):
    """What runs it, and its `Side` of the page."""
    from ..devices import device, working_dtype
    from ..export.backends import backend_of
    from ..models.loading import load_config, load_tokenizer
    from ._page import Side
    from .generate import load_answering

    config = load_config(name)
    if not config.is_encoder_decoder:
        raise ValueError(
            f"{name} is a decoder-only model ({config.model_type}), and the page is for encoder-decoders: name one, "
            "or talk to this model with `transformers chat`"
        )
    model = load_answering(name, dtype=working_dtype())
    tokenizer = load_tokenizer(name)
    manifest = getattr(model, "manifest", None)
    if manifest is None:
        return _in_pytorch(model), Side(model.to(device()), tokenizer, _size(model))
    backend = f"{backend_of(manifest['target']).runtime} {manifest['variant']}"
    if manifest["shapes"] != "dynamic":
        backend += f" {manifest['shapes']}"
    shapes = model.graphs.shapes
    # A merged student's start token counts as one of the prompt's.
    most_prompt = shapes.prompts and max(shapes.prompts) + (model.config.cross_attention == "merged")
    return backend, Side(model, tokenizer, backend, most_prompt, shapes.targets)


def _blank_image() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def _in_pytorch(model) -> str:
    return f"PyTorch {str(model.dtype).removeprefix('torch.')}"


def _size(model) -> str:
    return f"{_in_pytorch(model)}, {model.num_parameters() / 1e6:.0f} M parameters"
