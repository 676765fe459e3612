"""Files that anybody may have made, read with errors that say what is in them; files of ours, whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any


try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

_LARGEST_YAML = 1_000_000  # bytes; a recipe has some hundred lines
_READ_AT_ONCE = 1 << 20  # bytes
_LONGEST_LINE = 400  # characters
_DEEPEST_YAML = 20  # levels; a recipe has two or three
_KINDS = {dict: "object", list: "list", str: "text", bool: "truth value", int: "integer", float: "number"}


def read_json(file: Path, kind: type[dict] | type[list] = dict, fields: Mapping[str, type] | None = None) -> Any:
    """
    Args:
        kind: what the file holds, `dict` or `list`.
        fields: those that an object has to have, with their types; an integer is a `float` too.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not JSON, or holds something else.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {what_it_is(file) or error}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{file} holds {_describe(content)}, expected a JSON {_KINDS[kind]}")
    if isinstance(content, dict):
        check_fields(content, fields or {}, str(file))
    return content


def check_fields(content: Mapping[str, Any], fields: Mapping[str, type], where: str) -> None:
    """Raises ValueError where one of the fields is not there or of another type; `where` is for the message."""
    for name, kind in fields.items():
        if name not in content:
            raise ValueError(f"{where} has no {name!r}, expected one of type {_KINDS[kind]}")
        if not _is_a(content[name], kind):
            raise ValueError(f"{where} has {_describe(content[name])} as {name!r}, expected type {_KINDS[kind]}")


def check_positive(content: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    """Raises ValueError where one of these numbers is not above 0, or not finite; `where` is for the message."""
    for name in names:
        if not 0 < content[name] <= sys.float_info.max:  # which an integer of JSON may exceed
            raise ValueError(f"{where} has {_describe(content[name])} as {name!r}, expected a finite number above 0")


def read_yaml(file: Path) -> Any:
    """What is in a YAML file, which may be a stranger's: small, and without references from one part to another, by
    which a few lines can stand for more than any memory holds.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no such YAML.
    """
    import yaml

    file = Path(file)
    if file.stat().st_size > _LARGEST_YAML:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, expected at most {_LARGEST_YAML} of YAML")
    if reason := what_it_is(file):  # a web page and a pointer may well be YAML
        raise ValueError(f"{file} cannot be read as YAML: {reason}")
    try:
        text = file.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST_YAML:  # each level makes all that follow slower to read
                raise ValueError(f"line {event.start_mark.line + 1} is {depth} levels deep, expected {_DEEPEST_YAML}")
            if isinstance(event, yaml.AliasEvent):
                line = event.start_mark.line + 1
                raise ValueError(f"line {line} has the alias *{event.anchor}: write out what it stands for")
        return yaml.load(text, Loader=_once_each(yaml.SafeLoader))
    # What the constructors of `!!int` and the like raise for a text that is none is not all a YAMLError.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as YAML: {one_line(error)}") from error


def _once_each(loader: type) -> type:
    """A loader of YAML that refuses a key which is there twice, where `safe_load` takes the last."""

    class OnceEach(loader):  # type: ignore[misc]
        def construct_mapping(self, node, deep=False):
            names = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
            if twice is not None:
                raise ValueError(f"line {node.start_mark.line + 1} begins a mapping that has {twice!r} twice")
            return super().construct_mapping(node, deep)

    return OnceEach


@contextmanager
def replacing(file: str | os.PathLike) -> Iterator[Path]:
    """A new empty file to write to, which takes the place of `file` at the end, and is removed after an error.

    It stands beside `file`, as NAME.RANDOM.tmp: a link that somebody put there under the name would be followed.
    """
    file = Path(file)
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
    temporary.touch(exist_ok=False)  # not by `tempfile`, whose files nobody else may read
    try:
        yield temporary
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """A new folder to write to, whose content `folder` has at the end; nothing of it stays after an error.

    It stands beside `folder` and takes its name. Where `folder` is there, and empty, it stands inside, and its files
    move up: that may be the current folder, or one where a disk is mounted, whose place nothing can take. If the block
    moves it elsewhere, `folder` gets nothing.

    Raises:
        OSError: somebody else has made `folder` meanwhile and put something into it.
    """
    folder = folder.resolve()  # "." has no name
    is_there, name = folder.exists(), f"{folder.name}.{uuid.uuid4().hex[:8]}.partial"  # nobody else's
    partial = (folder if is_there else folder.parent) / name
    partial.mkdir(parents=True)
    try:
        yield partial
        if is_there and partial.exists():
            for path in partial.iterdir():
                path.rename(folder / path.name)
        elif partial.exists():
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps others that ask for it out of a folder, which is made where it is not there, while the block runs.

    It is a lock on the folder itself, which leaves no file behind and goes with its process, however that ends.
    Windows and some disks of a network have none.

    Raises:
        ValueError: another process is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is at work in {folder}: wait until it has come to its end, or stop it"
            ) from None
        except OSError:  # of a disk without locks
            pass
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # which a process that was forked from this one would keep
        os.close(handle)


def write_text(file: Path, text: str) -> None:
    """Whole or not at all."""
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(file: Path, content: Any) -> None:
    """Whole or not at all."""
    write_text(file, json.dumps(content, indent=1))


def what_it_is(file: Path) -> str | None:
    """What a file is that came in place of the one that was meant, and the way out; None if its begin does not say."""
    with open(file, "rb") as stream:
        begin = stream.read(256).lstrip(b"\xef\xbb\xbf \t\r\n")
    if not begin:
        return "it is empty; download or save it again"
    if begin.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; run `git lfs pull` where it was cloned"
    if begin[:5].lower() in (b"<!doc", b"<html", b"<?xml"):
        return f"it is a web page, it begins with {begin[:15].decode('latin-1')!r}; download the file itself"
    return None


def is_used(folder: Path) -> bool:
    """Whether something is there that a new folder would take the place of."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def sha256(file: Path) -> str:
    """Of the bytes of a file, which are read in blocks."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while content := stream.read(_READ_AT_ONCE):
            digest.update(content)
    return digest.hexdigest()


def named_inside(folder: Path, name: Any) -> Path:
    """`folder / name`, for a name that a file in the folder gives.

    Raises:
        ValueError: it is no relative path, or leads out of the folder.
    """
    # Of either system: a folder made on one may be read on the other.
    paths = [path(name) for path in (PurePosixPath, PureWindowsPath)] if isinstance(name, str) else []
    if not name or not paths or "\0" in name or any(path.anchor or ".." in path.parts for path in paths):
        raise ValueError(f"{name!r} is named in {folder}, expected the name of a file in that folder")
    return folder / name


def inside(folder: Path, name: Any) -> Path:
    """The same, and no symbolic link on the way leads out of the folder either: for what is published.

    The Hub's cache is the exception: its snapshots are links into the blobs of the same repository.

    Raises:
        ValueError: it leads out.
    """
    path, root = named_inside(folder, name), folder.resolve()
    in_cache = (parent for parent in root.parents if parent.name == "snapshots" and "--" in parent.parent.name)
    own = [root, *(snapshots.parent / "blobs" for snapshots in in_cache)]
    target = path.resolve()
    if not any(target.is_relative_to(place) for place in own):
        raise ValueError(
            f"{path} is a link that leads out of the folder, to {target}: nothing is read from there; put a copy of "
            "the file in its place"
        )
    return path


def check_own_files(folder: Path, but: tuple[str, ...] = ()) -> None:
    """Raises ValueError where a file in the folder, or a chat template in a subfolder, is a link that leads out of it.

    Args:
        but: suffixes of files that may be such links.
    """
    for path in (*folder.iterdir(), *folder.glob("*/*.jinja")):
        if not path.is_dir() and path.suffix not in but:
            inside(folder, path.relative_to(folder).as_posix())


def one_line(error: BaseException) -> str:
    """The message of an error of another library, with the error's type where the message alone says little."""
    text = " ".join(str(error).split())
    text = text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"
    return text if len(text) <= _LONGEST_LINE else f"{text[:_LONGEST_LINE]} ..."


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool):  # which is an int to Python
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _describe(value: Any) -> str:
    text = repr(value)
    return f"the {type(value).__name__} {text if len(text) <= 60 else text[:60] + '...'}"
