"""Long descriptions of Debian's packages to their one-line synopses, as pairs for `distill`.

    python examples/tasks/summarization.py data/summarization

On Debian and its derivatives the package index is fetched by `apt-get update`, into a temporary folder and without
rights. Elsewhere --index names files that are there: the index's Translation-en, or /var/lib/dpkg/status.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from hf_encdec_distill.data import save_pairs


STANZA = re.compile(r"Package: (\S+)\n(?:.*\n)*?Description(?:-en)?: (.+)\n((?: .*\n?)+)")
SHORTEST = 60  # characters of a description


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for train.jsonl, validation.jsonl and test.jsonl")
    parser.add_argument("--index", type=Path, nargs="+", metavar="FILE", help="default: fetched")
    args = parser.parse_args()
    indexes = fetch_indexes() if args.index is None else [file.read_text(encoding="utf-8") for file in args.index]
    splits: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    seen: set[str] = set()
    for package, text, synopsis in descriptions(indexes):
        # Packages of a family copy each other's text, which is taken once.
        if len(text) >= SHORTEST and not {text, synopsis} & seen:
            seen |= {text, synopsis}
            splits[split_of(package)].append({"source": text, "target": synopsis})
    for split, pairs in splits.items():
        print(f"{split}: {save_pairs(pairs, args.output / f'{split}.jsonl')} pairs")


def fetch_indexes() -> list[str]:
    """The indexes of descriptions, which most container images leave out of theirs."""
    with tempfile.TemporaryDirectory() as state:
        lists = Path(state) / "lists"
        (lists / "partial").mkdir(parents=True)
        options = ["-o", f"Dir::State={state}", "-o", f"Dir::Cache={state}", "-o", "Acquire::Languages=en"]
        subprocess.run(["apt-get", "update", *options, "-o", "APT::Sandbox::User="], check=True, capture_output=True)
        helper = ["/usr/lib/apt/apt-helper", "cat-file"]
        files = sorted(lists.glob("*_main_i18n_Translation-en*"))
        return [subprocess.run([*helper, file], check=True, capture_output=True, text=True).stdout for file in files]


def descriptions(indexes: Iterable[str]) -> Iterable[tuple[str, str, str]]:
    """Name, long description and synopsis of each package (Debian Policy, section 5.6.13)."""
    for index in indexes:
        for match in filter(None, map(STANZA.match, index.split("\n\n"))):
            package, synopsis, text = match.groups()
            yield package, "\n".join("" if line == " ." else line[1:] for line in text.rstrip().split("\n")), synopsis


def split_of(package: str) -> str:
    """Families of packages (`foo`, `foo-doc`, `libfoo-dev`) lie in one split: a hash of their name decides."""
    family = re.sub(r"^(lib|python3?-|golang-|node-|r-|ruby-|rust-|fonts-|haskell-)+", "", package)[:4]
    place = sum(family.encode()) * 2654435761 % 100
    return "validation" if place < 5 else "test" if place < 10 else "train"


if __name__ == "__main__":
    main()
