"""English messages of programs and their translations, as pairs for `distill`.

    python examples/tasks/translation.py data/translation.jsonl --language de

or, of a dataset on the Hub with the column `translation`, a dict of languages:

    python examples/tasks/translation.py data/translation.jsonl --dataset Helsinki-NLP/opus_books --config de-en

Without one, the pairs are read from the gettext catalogues (.mo) of the Python packages that are installed and of
the system, /usr/share/locale; --catalogues names other folders. Into German, the wheels of django, django-allauth and
sphinx have 600, a Debian with GTK and PostgreSQL has 14,000. Needs Babel: pip install babel.
"""

import argparse
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from babel.messages.mofile import read_mo
from datasets import load_dataset

from hf_encdec_distill.data import save_pairs


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
    parser.add_argument("--dataset", metavar="NAME", help="on the Hub, in place of catalogues; its train split")
    parser.add_argument("--config", metavar="NAME", help="configuration of the dataset")
    args = parser.parse_args()
    if args.dataset is not None:
        rows = load_dataset(args.dataset, args.config, split="train")["translation"]
        pairs = [{"source": row["en"], "target": row[args.language]} for row in rows]
    else:
        pairs = [{"source": source, "target": target} for source, target in messages(args.catalogues, args.language)]
    print(f"{save_pairs(pairs, args.output)} pairs")


def messages(folders: Iterable[Path], language: str) -> Iterator[tuple[str, str]]:
    """Each message once, and its translation.

    Those with plurals are left out, whose forms are not the same in number.
    """
    seen: set[str] = set()
    for file in sorted(file for folder in folders for file in folder.rglob("LC_MESSAGES/*.mo")):
        if language not in (file.parts[-3], file.parts[-3].split("_")[0]):
            continue
        with file.open("rb") as stream:
            catalogue = read_mo(stream)
        for message in catalogue:
            source, target = message.id, message.string
            if not isinstance(source, str) or len(source.split()) < FEWEST_WORDS or source in seen:
                continue
            if target not in ("", source):
                seen.add(source)
                yield source, target


if __name__ == "__main__":
    main()
