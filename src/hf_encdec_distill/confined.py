"""Names in a folder that a stranger may have made: they stay inside it, or nothing is read.

What is published (a push, an export, a card, a cache) takes files by name. A name can come from a JSON file or be a
symbolic link; neither may reach a private key.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath


def named_inside(folder: Path, name: str) -> Path:
    """`folder / name`, for a name that a file in `folder` gives.

    Raises:
        ValueError: the name is absolute, or goes up with `..`.
    """
    # Of either system: a folder made on one may be read on the other.
    kinds = (PurePosixPath(name), PureWindowsPath(name))
    if any(path.is_absolute() or path.anchor or ".." in path.parts for path in kinds):
        raise ValueError(
            f"{folder} names a file outside of it, {name!r}: nothing is read from there; correct the name"
        )
    return folder / name


def inside(folder: Path, name: str) -> Path:
    """The same, and no symbolic link on the way leads out of `folder` either.

    The Hub's cache is the exception: its snapshots are links into the blobs of the same repository.

    Raises:
        ValueError: it leads out.
    """
    path, root = named_inside(folder, name), folder.resolve()
    own = [root, *([root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [])]
    target = path.resolve()
    if not any(target.is_relative_to(place) for place in own):
        raise ValueError(
            f"{path} is a link that leads out of the folder, to {target}: nothing is read from there; put a copy of "
            "the file in its place"
        )
    return path
