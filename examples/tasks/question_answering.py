"""Question and paragraph to the answer, out of data in SQuAD's format, as pairs for `distill`.

    python examples/tasks/question_answering.py data/question_answering --dataset rajpurkar/squad

or, of files as SQuAD's own site has them (arXiv 1606.05250):

    python examples/tasks/question_answering.py data/question_answering --train train-v1.1.json --test dev-v1.1.json

What is read is T5's "question: ... context: ..." (arXiv 1910.10683), so that a context that is cut is cut at its end.
The answer is the first of those that annotators gave; questions without one (SQuAD 2.0) are left out. SQuAD's
development set becomes the test split, and the validation split is carved out of train when the pairs are loaded.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import load_dataset

from hf_encdec_distill.data import save_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for train.jsonl and test.jsonl")
    parser.add_argument("--dataset", help="name on the Hub, with the columns of rajpurkar/squad")
    parser.add_argument("--train", type=Path, metavar="FILE", help="SQuAD's JSON")
    parser.add_argument("--test", type=Path, metavar="FILE", help="SQuAD's JSON")
    args = parser.parse_args()
    if (args.dataset is None) == (args.train is None or args.test is None):
        parser.error("give either --dataset, or --train and --test")
    if args.dataset is not None:
        rows = load_dataset(args.dataset)
        splits = {"train": rows["train"], "test": rows["validation"]}
    else:
        splits = {"train": read_squad(args.train), "test": read_squad(args.test)}
    for split, questions in splits.items():
        print(f"{split}: {save_pairs(as_pairs(questions), args.output / f'{split}.jsonl')} pairs")


def read_squad(file: Path) -> Iterator[dict[str, Any]]:
    """The questions of a file in SQuAD's JSON format, with the columns that rajpurkar/squad has on the Hub."""
    for article in json.loads(file.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = {"text": [answer["text"] for answer in question["answers"]]}
                yield {"context": paragraph["context"], "question": question["question"], "answers": answers}


def as_pairs(questions: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    for row in questions:
        if row["answers"]["text"]:
            source = f"question: {row['question'].strip()} context: {row['context'].strip()}"
            yield {"source": source, "target": row["answers"]["text"][0]}


if __name__ == "__main__":
    main()
