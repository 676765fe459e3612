"""What a bench found: the headline, two reports side by side, a report against an earlier one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import check_fields, check_positive, read_json
from .contenders import PRECISIONS


VERSION = 1
_FIELDS = {"version": int, "rounds": int, "headlines": list, "rows": list}
_REQUEST = ("source", "target", "batch")
_WHO = ("model", "backend", "precision")
_ROW = {**dict.fromkeys(_WHO, str), **dict.fromkeys(_REQUEST, int)}
TIMES = ("first_token_ms", "step_ms", "request_ms")
_SPREAD = {"value": float, "low": float, "high": float}
_ROUNDS = 3  # that have a spread to speak of


def headlines(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each request the student's fastest row and the fastest decoder-only row of any backend whose weights take
    no more bytes each, and `ratio`: student / decoder-only within each round, median and quartiles."""
    from .latency import quartiles

    found = []
    for request in dict.fromkeys(tuple(row[name] for name in _REQUEST) for row in rows):
        of_request = [row for row in rows if tuple(row[name] for name in _REQUEST) == request]
        student = _fastest([row for row in of_request if row["model"] == "student"])
        if student is None:
            continue
        most = PRECISIONS[student["precision"]]
        other = _fastest(
            [row for row in of_request if row["model"] != "student" and PRECISIONS[row["precision"]] <= most]
        )
        if other is None:
            continue
        ratios = [
            ours["request_ms"] / theirs["request_ms"]
            for ours, theirs in zip(student["measured"], other["measured"], strict=True)
        ]
        found.append(
            {
                **dict(zip(_REQUEST, request, strict=True)),
                "student": {name: student[name] for name in (*_WHO, "request_ms")},
                "decoder_only": {name: other[name] for name in (*_WHO, "request_ms")},
                "ratio": quartiles(ratios),
            }
        )
    return found


def _fastest(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return min(rows, key=lambda row: row["request_ms"]["value"], default=None)


def read_report(file: Path) -> dict[str, Any]:
    """A `bench.json`.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is none, of a newer version, or has a time that cannot be (the row and the field are named).
    """
    report = read_json(file, fields=_FIELDS)
    if report["version"] > VERSION:
        raise ValueError(
            f"{file} is of version {report['version']}, this package reads up to {VERSION}: "
            "pip install -U hf-encdec-distill"
        )
    for part, times in (("rows", TIMES), ("headlines", ("ratio",))):
        for number, entry in enumerate(report[part]):
            where = f"{file}, {part}[{number}],"
            if not isinstance(entry, dict):
                raise ValueError(f"{where} is no object: measure again with hf-encdec-distill bench")
            check_fields(entry, {**(_ROW if part == "rows" else dict.fromkeys(_REQUEST, int))}, where)
            check_fields(entry, dict.fromkeys(times, dict), where)
            for name in times:
                check_fields(entry[name], _SPREAD, f"{where} {name}")
                check_positive(entry[name], _SPREAD, f"{where} {name}")
    return report


def compare(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that both reports have, with `ratio`: the other's median over the first one's, of each time.

    Raises:
        ValueError: they have none in common.
    """
    theirs = {_key(row): row for row in other["rows"]}
    both = [(row, theirs[_key(row)]) for row in one["rows"] if _key(row) in theirs]
    if not both:
        raise ValueError(
            "the two reports have no row in common: measure the same model, backend, precision and lengths in both"
        )
    return [
        {
            **{name: row[name] for name in (*_WHO, *_REQUEST)},
            "ratio": {name: found[name]["value"] / row[name]["value"] for name in TIMES},
        }
        for row, found in both
    ]


def _key(row: Mapping[str, Any]) -> tuple:
    return tuple(row[name] for name in (*_WHO, *_REQUEST))


def check_rounds(name: str, rounds: int) -> None:
    """
    Raises:
        ValueError: the bench called `name` has too few rounds for a spread.
    """
    if rounds < _ROUNDS:
        raise ValueError(f"{name} has {rounds} rounds, and a spread takes {_ROUNDS}: give --rounds or --minutes more")


def check_against(report: Mapping[str, Any], baseline: Mapping[str, Any], file: Path) -> None:
    """A ratio student / decoder-only may rise by the larger of the two spreads (from quartile to quartile). A request
    of the baseline that was not asked for in this bench is passed over.

    Args:
        baseline: read from `file`.

    Raises:
        ValueError: one rose by more, a request that was asked for has none any more, the reports have no request in
            common, or too few rounds for a spread.
    """
    check_rounds(str(file), baseline["rounds"])
    check_rounds("this bench", report["rounds"])
    before = {tuple(entry[name] for name in _REQUEST): entry["ratio"] for entry in baseline["headlines"]}
    now = {tuple(entry[name] for name in _REQUEST): entry["ratio"] for entry in report["headlines"]}
    left_out = [entry for entry in report["left_out"] if "source" in entry]
    asked = {tuple(entry[name] for name in _REQUEST) for entry in (*report["rows"], *left_out)}
    lost = sorted((before.keys() & asked) - now.keys())
    if lost:
        each = (f"{_words(request)}, {_why_left_out(report['left_out'], request)}" for request in lost)
        raise ValueError(
            f"{file} has a ratio student / decoder-only where this bench has none: {'; '.join(each)}. Measure both "
            "again, with what is missing"
        )
    if not before.keys() & now.keys():
        raise ValueError(f"{file} has no request of this bench: give the --source, --target and --batch of its rows")
    risen = []
    for request in before.keys() & now.keys():
        old, new = before[request], now[request]
        spread = max(ratio["high"] - ratio["low"] for ratio in (old, new))
        if new["value"] - old["value"] > spread:
            risen.append(f"{_words(request)}: {old['value']:.2f} before, {new['value']:.2f} now, spread {spread:.2f}")
    if risen:
        raise ValueError(f"student / decoder-only rose by more than its spread: {'; '.join(sorted(risen))}")


def _words(request: tuple) -> str:
    source, target, batch = request
    return f"{source} in, {target} out, batch {batch}"


def _why_left_out(entries: Sequence[Mapping[str, Any]], request: tuple) -> str:
    """Who has no row for a request, and why; those that could not even be loaded have none for any."""
    whom: dict[str, list[str]] = {}
    for entry in entries:
        if "source" not in entry or tuple(entry[name] for name in _REQUEST) == request:
            whom.setdefault(entry["why"], []).append(" ".join(entry[name] for name in _WHO))
    if not whom:
        return "where no model was left out, so give --backend and --precision of both sides"
    return "left out: " + "; ".join(f"{', '.join(names)} ({why})" for why, names in whom.items())
