"""`hf-encdec-distill COMMAND ...`: the parser, and what a person sees when something goes wrong.

The result goes to stdout, all else to stderr. Exit codes are in docs/commands.md.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from .. import __version__
from ..files import one_line
from . import (
    bench,
    cache,
    convert_mu,
    demo,
    distill,
    doctor,
    evaluate,
    export,
    generate,
    heal,
    info,
    init,
    plan,
    push,
    serve,
    teach,
)
from ._display import wrap
from .quickstart import command as quickstart


PROGRAM = "hf-encdec-distill"
COMMANDS = {
    "quickstart": quickstart,
    "plan": plan,
    "init": init,
    "teach": teach,
    "heal": heal,
    "cache": cache,
    "distill": distill,
    "evaluate": evaluate,
    "export": export,
    "generate": generate,
    "push": push,
    "demo": demo,
    "serve": serve,
    "convert-mu": convert_mu,
    "info": info,
    "bench": bench,
    "doctor": doctor,
}
_SYNONYMS = {"adapt": "heal"}  # what it was called before 0.1.0
# In the words of torch, safetensors ("IoError" before 0.6) and llama.cpp, whose errors are no OSError and no
# MemoryError.
_NO_MEMORY = re.compile(r"can't allocate memory|out of memory|bad_alloc")
_NO_ROOM = re.compile(
    r"No space left|I/O error|IoError|iostream error|PytorchStreamWriter|inline_container.*unexpected pos"
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; the namespace it returns carries the command's module as `module`."""
    shared = _Parser(add_help=False)
    shared.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    parser = _Parser(
        prog=PROGRAM,
        description="Distil a decoder-only language model into a small, fast encoder-decoder.",
        epilog=f"example: {PROGRAM} quickstart --minutes 12",
        parents=[shared],
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description="\n\n".join(wrap(" ".join(part.split())) for part in (module.__doc__ or "").split("\n\n")),
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[shared],
            allow_abbrev=False,  # an abbreviation could swallow a training argument that is passed through
        )
        command.add_argument("--json", action="store_true", help="print the result as one JSON object")
        module.add_arguments(command)
        command.set_defaults(module=module, parser=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may come next
        import argcomplete

        argcomplete.autocomplete(parser)
    words = sys.argv[1:] if argv is None else argv
    command = next((word for word in words if not word.startswith("-")), None)
    if command is not None and command not in COMMANDS:
        parser.error(_unknown(command))
    args, extra = parser.parse_known_args(words)
    if args.version:
        print(__version__)
        return 0
    if args.command is None:
        parser.print_help()
        return 0
    if extra and not getattr(args.module, "PASSES_ARGUMENTS_ON", False):
        args.parser.error(f"unrecognized arguments: {' '.join(extra)}")
    args.extra, args.stdout, args.stopped = extra, sys.stdout, 128 + signal.SIGINT
    args.until_end = contextlib.ExitStack()  # what a command holds
    try:
        if getattr(args, "output", None) is not None:
            args.output = _output(args.output)
        # What libraries print is no part of the result.
        with _ended_like_ctrl_c(args), _no_empty_folder(args), args.until_end, contextlib.redirect_stdout(sys.stderr):
            args.module.run(args)
    except KeyboardInterrupt as interrupt:
        said = interrupt if interrupt.args else getattr(args.module, "INTERRUPTED", "interrupted")
        print(f"{PROGRAM} {args.command}: {said}", file=sys.stderr)
        return args.stopped
    except Exception as error:
        message = _to_mend(error)
        if message is None or getattr(args, "debug", False):
            raise
        print(f"{PROGRAM} {args.command}: error: {message}", file=sys.stderr)
        return 2
    return 0


def _to_mend(error: Exception) -> str | None:
    """What to say of an error that is no bug of the package, or `None`."""
    if isinstance(error, ValueError | OSError | ImportError):
        return " ".join(str(error).split()) or type(error).__name__
    text = one_line(error)
    if isinstance(error, MemoryError) or _NO_MEMORY.search(text):
        return f"memory ran out ({text}): give smaller batches, shorter texts or a smaller model"
    if _NO_ROOM.search(text):
        return f"a file could not be written ({text}): make room on that disk, or name a folder on another one"
    return None


def _unknown(command: str) -> str:
    """In the words of argparse, which suggests a name itself from Python 3.14 on, but only where it is told to."""
    closest = _SYNONYMS.get(command) or next(iter(difflib.get_close_matches(command, COMMANDS, n=1)), None)
    maybe = f", maybe you meant {closest!r}?" if closest else ""
    return f"argument COMMAND: invalid choice: {command!r}{maybe} (choose from {', '.join(COMMANDS)})"


def _output(output: str | Path) -> str | Path:
    """With the home folder for `~`, which a shell leaves as it is in --output=~/new, and transformers does not.

    Raises:
        ValueError: nothing can be made there.
    """
    output = type(output)(os.path.expanduser(output))
    place = next(path for path in (Path(output), *Path(output).parents) if os.path.lexists(path))
    if not os.path.exists(output) and not place.is_dir():
        what = "a file" if place.exists() else "a link to nothing"
        raise ValueError(f"{output} cannot be made, {place} is {what}: choose another folder with --output")
    return output


@contextlib.contextmanager
def _ended_like_ctrl_c(args: argparse.Namespace) -> Iterator[None]:
    """SIGTERM, which `timeout`, Docker and schedulers send, ends a command as Ctrl-C does: what can be saved is saved,
    and what is half done goes. The processes of a launcher are left to it."""
    is_default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not is_default or threading.current_thread() is not threading.main_thread() or "LOCAL_RANK" in os.environ:
        yield
        return
    own = os.getpid()

    def stop(signum, frame):
        if os.getpid() != own:  # a process that was forked from this one, and has nothing to save
            os._exit(128 + signum)
        args.stopped = 128 + signum
        on_interrupt = signal.getsignal(signal.SIGINT)  # which a shell has ignored for what it runs in the background
        (on_interrupt if callable(on_interrupt) else signal.default_int_handler)(signum, frame)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def _no_empty_folder(args: argparse.Namespace) -> Iterator[None]:
    """Where a command ends before it has written anything, the folder goes that a trainer made at its beginning."""
    output = getattr(args, "output", None)
    if output is None or os.path.exists(output):
        yield
        return
    try:
        yield
    finally:
        if os.path.isdir(output) and not any(path.is_file() for path in Path(output).rglob("*")):
            shutil.rmtree(output)
