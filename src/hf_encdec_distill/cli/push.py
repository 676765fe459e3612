"""Push a finished student to the Hub in one commit: everything is uploaded, or nothing is.

It uploads the weights (safetensors), the config, the model files named in it, the generation config, the tokenizer,
the processor of a student that reads images, the card with its figures, the recipe, and the proven exports in
subfolders. The card's section on loading names the repository and these exports. Everything else stays: checkpoints,
the trainer's state, pickles. A file outside the folder is never uploaded, whatever names it or links to it. Weights
and exports of an earlier push are replaced.
"""

from __future__ import annotations

import argparse
import html
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ..cards.loading import PARITY, READS_IMAGES, proven_exports, why_not_proven, with_loading
from ..files import inside, read_json
from ._display import say_result, table, wrap


SUMMARY = "push a student, its card and its exports to the Hub"
EXAMPLE = "hf-encdec-distill push runs/quickstart/student user/name --private --dry-run"

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_CARD = "README.md"
# Of a student that reads images; the second is what transformers 4.57 reads.
_PROCESSOR = ("processor_config.json", "preprocessor_config.json")
# Of one kind of tokenizer or another; `save_pretrained` of transformers writes them.
_TOKENIZER = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "tekken.json",
    "tokenizer.model",
)
_TEMPLATES = "additional_chat_templates/"  # those of a tokenizer that has several, each by its name
_RECORDS = ("recipe.json", "recipe.yaml", "provenance.json", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
# `![text](path "title")` or `![text](<path>)`; `![text][name]` or `![name]`, and `[name]: path`; `<img src="path">`
# and `<source srcset="path 1x, path 2x">`; what is not shown, as code or a comment; a picture that is on the web or,
# as `data:`, in the card itself.
_TEXT = r"(?<!\\)!\[((?:[^\[\]]|\[[^\[\]]*\])*)\]"
_PATH = r"(?:<([^>\n]*)>|((?:[^\s()]|\([^\s()]*\))+))"
_FIGURE = re.compile(_TEXT + r"\(\s*" + _PATH + r"(?:\s+(?:\"[^\"]*\"|'[^']*'|\([^)]*\)))?\s*\)")
_NAMED = re.compile(_TEXT + r"(?:\[([^\[\]]*)\])?(?!\()")
_NAME = re.compile(r"^ {0,3}\[([^\[\]]+)\]:\s*(?:<([^>\n]*)>|(\S+))", re.MULTILINE)
_TAG = re.compile(r"<(?:img|source)(\s(?:[^>\"']|\"[^\"]*\"|'[^']*')*)", re.IGNORECASE)
_SOURCE = re.compile(r"\s(src|srcset)\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|([^\s\"'>]+))", re.IGNORECASE)
_HIDDEN = re.compile(r"^ *(`{3,}|~{3,}).*?^ *\1|(`+)[^\n]+?\2|<!--(?:(?!<!--).)*?-->", re.DOTALL | re.MULTILINE)
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]+:|//", re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="folder of the student, from quickstart, distill or export")
    parser.add_argument("repo_id", metavar="REPO_ID", help="user/name; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument(
        "--revision", metavar="BRANCH", help="branch to push to; created if it does not exist (default: main)"
    )
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of a commit")
    parser.add_argument("--commit-message", default="Upload a student", metavar="TEXT", help="default: %(default)s")
    parser.add_argument(
        "--include",
        nargs="*",
        metavar="EXPORT",
        help="subfolders with exports to push; without a name, none (default: all that are proven)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list what would be uploaded, without using the network"
    )


def run(args: argparse.Namespace) -> None:
    from huggingface_hub.utils import validate_repo_id

    from ..models.finite import check_finite_files

    validate_repo_id(args.repo_id)
    folder = Path(args.folder)
    names = files_to_push(folder, args.include)
    paths = {name: inside(folder, name) for name in names}
    check_finite_files(path for name, path in paths.items() if name.endswith(".safetensors"))
    files: dict[str, Path | bytes] = {**paths}
    if _CARD in files:
        files[_CARD] = _card(folder, names, args.repo_id)
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    result: dict[str, Any] = {
        "repo_id": args.repo_id,
        "files": [{"path": name, "bytes": size} for name, size in sizes.items()],
        "left_out": _left_out(folder, names),
    }
    if not args.dry_run:
        result |= _push(files, args)
    say_result(args, result, _page(result))


def files_to_push(folder: Path, exports: list[str] | None = None) -> list[str]:
    """What of a student's folder belongs on the Hub, relative to the folder.

    Args:
        exports: subfolders with an export; by default all that are proven.

    Raises:
        ValueError: the student is not whole, a file of it lies outside of the folder, its card is none to
            huggingface_hub, or an export is not proven or not as it was when it was.
    """
    from ..models.loading import check_folder

    if not inside(folder, "config.json").is_file():
        raise ValueError(
            f"{folder} holds no student, there is no config.json: name a folder that save_pretrained wrote"
        )
    check_folder(folder)
    names = [*_weights(folder), *_beside_weights(folder)]
    missing = sorted(name for name in _named_code(folder) if name not in names)
    if missing:
        raise ValueError(f"{folder} names {', '.join(missing)}, not there: save the student again")
    if not (folder / "tokenizer_config.json").is_file():
        raise ValueError(f"{folder} has no tokenizer: save it there first, tokenizer.save_pretrained({str(folder)!r})")
    missing = [name for name in _PROCESSOR if not (folder / name).is_file()]
    if missing and read_json(inside(folder, "config.json")).get("model_type") == READS_IMAGES:
        raise ValueError(
            f"{folder} has no processor, {' and '.join(missing)}: save it there first, "
            f"processor.save_pretrained({str(folder)!r})"
        )
    names += [name for name in _RECORDS if (folder / name).is_file()]
    if (folder / _CARD).is_file():
        names += [_CARD, *_figures(folder)]
    for export in proven_exports(folder) if exports is None else exports:
        names += [f"{Path(export).as_posix()}/{name}" for name in _of_export(inside(folder, export))]
    return list(dict.fromkeys(names))


def _weights(folder: Path) -> list[str]:
    """One file, or all shards with their index: what `from_pretrained` would read."""
    if (folder / _WEIGHTS).is_file():
        return [_WEIGHTS]
    if not (folder / _INDEX).is_file():
        raise ValueError(f"{folder} has no weights in safetensors: save the student there with save_pretrained")
    index = read_json(inside(folder, _INDEX), fields={"weight_map": dict})
    shards = sorted(set(index["weight_map"].values()))
    missing = [shard for shard in shards if not inside(folder, shard).is_file()]
    if missing:
        raise ValueError(f"{folder / _INDEX} names {', '.join(missing)}, not there: save the student again")
    return [_INDEX, *shards]


def _beside_weights(folder: Path) -> list[str]:
    """Config, generation config, tokenizer, processor, and the Python files that an `auto_map` names, where there."""
    from transformers.dynamic_module_utils import get_relative_imports

    code, new = set(), {name for name in _named_code(folder) if inside(folder, name).is_file()}
    while new:
        code |= new
        imported = {f"{module}.py" for name in new for module in get_relative_imports(inside(folder, name))}
        new = imported - code
    templates = sorted(path.relative_to(folder).as_posix() for path in folder.glob(f"{_TEMPLATES}*.jinja"))
    names = ("config.json", "generation_config.json", *sorted(code), *_TOKENIZER, *templates, *_PROCESSOR)
    return [name for name in names if (folder / name).is_file()]


def _named_code(folder: Path) -> set[str]:
    """Of this folder: `user/name--module.Class` is code of another repository."""
    kinds = ("config.json", "tokenizer_config.json", *_PROCESSOR)
    configs = [name for name in kinds if (folder / name).is_file()]
    auto_maps = [read_json(inside(folder, name)).get("auto_map") or {} for name in configs]
    values = [value for auto_map in auto_maps for value in auto_map.values()]
    entries = [value if isinstance(value, list) else [value] for value in values]  # two of a tokenizer
    targets = [target for entry in entries for target in entry if isinstance(target, str)]
    return {f"{target.partition('.')[0]}.py" for target in targets if "--" not in target}


def _figures(folder: Path) -> list[str]:
    """The pictures of this folder that the card shows.

    Raises:
        ValueError: huggingface_hub cannot read the card's metadata.
    """
    from huggingface_hub import ModelCard

    try:
        card = ModelCard.load(inside(folder, _CARD))
    except Exception as error:  # PyYAML's are no ValueErrors
        raise ValueError(f"the metadata of {folder / _CARD} are not valid: {error}") from error
    there = (re.split("[?#]", path)[0] for path in _pictures(card.text) if not _ELSEWHERE.match(path))
    shown = [Path(unquote(path)).as_posix() for path in there if path]
    missing = [path for path in shown if not inside(folder, path).is_file()]
    if missing:
        raise ValueError(f"{folder / _CARD} shows {', '.join(missing)}, not in {folder}: put it there or take it out")
    return shown


def _pictures(text: str) -> list[str]:
    """The pictures that a card shows, those of Markdown and those of HTML; paths in it, or addresses."""
    text = _HIDDEN.sub("", text)
    of_markdown = [bracketed or plain for _, bracketed, plain in _FIGURE.findall(text)]
    named = {name.casefold(): bracketed or plain for name, bracketed, plain in _NAME.findall(text)}
    names = [(name or shown).casefold() for shown, name in _NAMED.findall(text)]
    of_markdown += [named[name] for name in names if name in named]
    of_html = []
    for attribute, *quoted in (found for tag in _TAG.findall(text) for found in _SOURCE.findall(tag)):
        value = html.unescape("".join(quoted))
        several = attribute.lower() == "srcset"
        of_html += [words[0] for part in value.split(",") if (words := part.split())] if several else [value]
    return [*of_markdown, *of_html]


def _card(folder: Path, names: list[str], repo_id: str) -> bytes:
    """As it reads on the Hub. Of a name without its user it cannot be known here whose it will be."""
    config = read_json(folder / "config.json", fields={"model_type": str})
    going = {name.rpartition("/")[0] for name in names if name.endswith(f"/{PARITY}")}
    exports = {name: report for name, report in proven_exports(folder).items() if name in going}
    text = inside(folder, _CARD).read_text(encoding="utf-8")
    name = repo_id if "/" in repo_id else None
    return with_loading(text, config["model_type"], exports, name).encode()


def _of_export(export: Path) -> list[str]:
    """Files of an export, all as they were when it was proven."""
    from ..export.manifest import MANIFEST, read_manifest

    manifest = read_manifest(export)
    reason = why_not_proven(export)
    if reason is not None:
        raise ValueError(f"{export} is not pushed, {reason}: export again, or leave it out")
    return [*manifest["files"], MANIFEST, PARITY, *_beside_weights(export)]


def _left_out(folder: Path, names: list[str]) -> list[str]:
    """Files and subfolders of which nothing goes up."""
    pushed = {name.partition("/")[0] for name in names}
    return sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if path.name not in pushed)


def _of_earlier_student(there: list[str]) -> list[str]:
    """Weights, exports and what else `from_pretrained` would read in the repository, of a student that it is no more:
    a chat template that was left there would be put around the prompt of the one that comes."""
    from ..export.manifest import MANIFEST

    exports = [name.removesuffix(MANIFEST) for name in there if name.endswith(f"/{MANIFEST}")]
    read = {"generation_config.json", *_TOKENIZER, *_PROCESSOR}
    return [
        name
        for name in there
        if name in read
        or re.fullmatch(r"model.*\.safetensors(\.index\.json)?", name)
        or name.startswith((_TEMPLATES, *exports))
    ]


def _push(files: dict[str, Path | bytes], args: argparse.Namespace) -> dict[str, str]:
    from huggingface_hub.utils import disable_progress_bars

    from ..hub import upload

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        commit = upload(
            files,
            args.repo_id,
            "model",
            args.commit_message,
            replaces=_of_earlier_student,
            private=args.private or None,
            revision=args.revision,
            create_pr=args.create_pr,
        )
    except OSError:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the bar of an upload that failed leaves its line open
        raise
    return {"commit": commit.oid, "url": commit.pr_url or commit.commit_url}


def _page(result: dict[str, Any]) -> str:
    files = result["files"]
    rows = [[file["path"], f"{file['bytes'] / 1e6:.3f}"] for file in files]
    rows.append([f"{len(files)} files", f"{sum(file['bytes'] for file in files) / 1e6:.3f}"])
    parts = [table([result["repo_id"], "MB"], rows)]
    if _CARD not in (file["path"] for file in files):
        parts.append("There is no model card: hf_encdec_distill.cards.write_model_card writes one.")
    if result["left_out"]:
        parts.append(wrap(f"Left out: {', '.join(result['left_out'])}"))
    parts.append(result.get("url", "Nothing was sent."))
    return "\n\n".join(parts)
