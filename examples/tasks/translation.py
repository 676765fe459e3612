"""English messages of programs and their translations, as pairs for `distill`.

    python examples/tasks/translation.py data/translation.jsonl --language de

The pairs are read out of the gettext catalogues (.mo) of the Python packages that are installed and of the system,
/usr/share/locale; --catalogues names other folders. Into German, the wheels of django, django-allauth and sphinx have
600, a Debian with GTK and PostgreSQL has 14,000. Needs Babel: pip install babel.
"""

import argparse
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from babel.messages.mofile import read_mo
from datasets import Dataset


FEWEST_WORDS = 3  # fewer are labels, which a language has in many forms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON lines file for the pairs")
    parser.add_argument("--language", default="de", help="code of a language, as de or pt_BR (default: %(default)s)")
    parser.add_argument(
        "--catalogues",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        default=[Path(sysconfig.get_path("purelib")), Path("/usr/share/locale")],
        help="where to look for */LC_MESSAGES/*.mo (default: Python's packages and the system)",
    )
    args = parser.parse_args()
    files = sorted(file for folder in args.catalogues for file in folder.rglob("LC_MESSAGES/*.mo"))
    of_language = [file for file in files if args.language in (file.parts[-3], file.parts[-3].split("_")[0])]
    pairs = dict(translations(of_language))
    if not pairs:
        folders = ", ".join(map(str, args.catalogues))
        parser.error(f"no translations into {args.language!r} in {folders}: install django, or name other folders")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"source": source, "target": target} for source, target in pairs.items()]
    Dataset.from_list(rows).to_json(args.output, force_ascii=False)
    print(f"{len(pairs)} pairs out of {len(of_language)} catalogues")


def translations(files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Messages and their translations; those with plurals are left out, whose forms are not the same in number."""
    for file in files:
        with file.open("rb") as stream:
            catalogue = read_mo(stream)
        for message in catalogue:
            source, target = message.id, message.string
            if isinstance(source, str) and len(source.split()) >= FEWEST_WORDS and target not in ("", source):
                yield source, target


if __name__ == "__main__":
    main()
