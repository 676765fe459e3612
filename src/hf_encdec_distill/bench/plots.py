"""Plots of a run: loss curves, quality and latency, as PNG and SVG, for light pages and for dark ones.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which people with any common colour blindness
can tell apart; lines differ in their dashes too. Spread is drawn as error bars and named. Figures are drawn on
matplotlib's Agg canvas directly, so that no display is needed and the caller's backend stays as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from ..files import replacing
from ..metrics.measures import METRICS, bounds, model_label, model_order, pareto_front


try:
    import matplotlib
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError('plots need matplotlib: pip install "hf-encdec-distill[demo]"') from error

_COLOURS = {
    "teacher_before": "#999999",
    "teacher": "text.color",
    "student_start": "#56B4E9",
    "student_ce": "#E69F00",
    "student_kd": "#0072B2",
    "lead_baseline": "#CC79A7",
}
# Themes by what their files' names end in: matplotlib's own styles and what we draw besides.
_THEMES = {
    "": ("default", {"grid.color": "#e6e6e6", "text.color": "#222222"}),
    "-dark": ("dark_background", {"grid.color": "#3d3d3d", "text.color": "#e6e6e6"}),
}
_OTHER_COLOURS = ("#009E73", "#D55E00", "#F0E442")
_DASHES = ("-", "--", "-.", ":")
_LOSSES = {"ce_loss": "cross-entropy, nats per target token", "distill_loss": "distillation loss"}
_READING = {
    **dict.fromkeys(("ce", "kl", "ece"), "lower is better"),
    "entropy_gap": "0: as sure as the teacher",
    "distinct": "100: no two alike",
}


_NOTE = {"textcoords": "offset points", "va": "center", "fontsize": 9}


def _colour(key: str, keys: Sequence[str]) -> str:
    others = [other for other in keys if other not in _COLOURS]
    colour = _COLOURS.get(key) or _OTHER_COLOURS[others.index(key) % len(_OTHER_COLOURS)]
    return matplotlib.rcParams.get(colour, colour)  # type: ignore[call-overload]  # keys are literals


def _save(draw: Callable[[], Figure], path: str | Path) -> Path:
    """Write `x.png`, `x.svg`, `x-dark.png` and `x-dark.svg` for a `path` of either suffix; returns `path`."""
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"cannot draw {path.name!r}: the name has to end in .png or .svg")
    for ending, (style, more) in _THEMES.items():
        # No date and no random ids inside: the same numbers give the same file.
        with matplotlib.style.context([style, {**more, "svg.hashsalt": path.stem}]):
            figure = draw()
            path.parent.mkdir(parents=True, exist_ok=True)
            for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
                file = path.with_name(f"{path.stem}{ending}{suffix}")
                with replacing(file) as temporary:
                    figure.savefig(temporary, format=suffix[1:], dpi=150, metadata=metadata)
    return path


def _figure(width: float, height: float, panels: int, **options) -> tuple[Figure, list]:
    """A figure of rows `height` inches high, three panels at most in each: a page shrinks wider ones too far."""
    columns = min(3, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options).flatten()
    for axis in axes[panels:]:
        axis.set_visible(False)
    for axis in axes[:panels]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=9)
    return figure, list(axes[:panels])


def plot_loss_curves(
    curves: Mapping[str, Sequence[Mapping]], path: str | Path, labels: Mapping[str, str] | None = None
) -> Path:
    """Training losses over steps, one line per run and one panel per loss: cross-entropy and distillation loss.

    The total is not drawn: that of a distilled run and that of one without cannot be compared. A run that logged only
    `loss`, as `Seq2SeqTrainer` does, was trained with cross-entropy alone, so that is its cross-entropy.

    Args:
        curves: for each run the rows of a Trainer's `log_history`; rows without a training loss are passed over.
        path: ends in `.png` or `.svg`; both are written, and `-dark` versions of both beside them.
        labels: names of the runs; default as in the model card.

    Raises:
        ValueError: if no run has a training loss, or for another suffix.
    """
    return _save(partial(_draw_loss_curves, curves, labels), path)


def _draw_loss_curves(curves: Mapping[str, Sequence[Mapping]], labels: Mapping[str, str] | None) -> Figure:
    panels: dict[str, dict[str, list]] = {name: {} for name in _LOSSES}
    for run, rows in curves.items():
        split = any(name in row for row in rows for name in _LOSSES)
        for name, key in (("ce_loss", "ce_loss" if split else "loss"), ("distill_loss", "distill_loss")):
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                panels[name][run] = points
    panels = {name: runs for name, runs in panels.items() if runs}
    if not panels:
        raise ValueError(
            f"no training loss in the curves of {', '.join(curves) or 'no run'}: pass Trainer.state.log_history"
        )
    figure, axes = _figure(5.2 * len(panels), 3.6, len(panels))
    for axis, (name, runs) in zip(axes, panels.items(), strict=True):
        for run, points in runs.items():
            axis.plot(
                *zip(*points, strict=True),
                label=(labels or {}).get(run) or model_label(run, {}),
                color=_colour(run, list(curves)),
                linestyle=_DASHES[list(curves).index(run) % len(_DASHES)],
                linewidth=1.8,
                marker="o" if len(points) < 3 else None,
            )
        axis.set_title(_LOSSES[name], fontsize=10, loc="left")
        axis.set_xlabel("step", fontsize=9)
        axis.grid(linewidth=0.8)
        axis.legend(frameon=False, fontsize=9)
    return figure


def _bars(axis, rows: Sequence[tuple[str, tuple[float, float, float] | None, str]], decimals: int):
    """Horizontal bars from zero, `(label, (value, low, high) or None, colour)` from top to bottom, with numbers."""
    for position, (_, numbers, colour) in enumerate(rows):
        if numbers is None:
            axis.annotate("not measured", (0, position), (5, 0), **_NOTE, color="#767676")
            continue
        value, low, high = numbers
        axis.barh(position, value, height=0.62, color=colour)
        if low < high:
            # A line in the page's colour under one in the text's: visible on a bar like either and beyond it.
            colours = matplotlib.rcParams["figure.facecolor"], matplotlib.rcParams["text.color"]
            for line, width in zip(colours, (3.4, 1.4), strict=True):
                axis.errorbar(
                    value, position, xerr=[[value - low], [high - value]], color=line, elinewidth=width, capsize=3
                )
        axis.annotate(f"{value:.{decimals}f}", (max(high, 0), position), (5, 0), **_NOTE)
    axis.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    ends = [0, *(end for _, numbers, _ in rows if numbers for end in numbers)]
    room = 0.24 * (max(ends) - min(ends)) or 1  # for the number beside the longest bar
    axis.set_xlim(min(ends), max(ends) + room)
    axis.locator_params(axis="x", nbins=5)
    axis.grid(axis="x", linewidth=0.8)
    axis.tick_params(axis="y", length=0)


def plot_quality(models: Mapping[str, Mapping], path: str | Path, spread: str | None = None) -> Path:
    """`metrics["models"]` as bars: a panel a metric, a row a model; models without a metric have no bar there.

    Args:
        models: see `hf_encdec_distill.cards.model_card`.
        path: ends in `.png` or `.svg`; both are written, and `-dark` versions of both beside them.
        spread: what the error bars are; printed below.

    Raises:
        ValueError: if no model has a metric, a metric is no Estimate, or for another suffix.
    """
    return _save(partial(_draw_quality, models, spread), path)


def _draw_quality(models: Mapping[str, Mapping], spread: str | None) -> Figure:
    keys = model_order(models)
    shown = [name for name in METRICS if any(models[key].get(name) is not None for key in keys)]
    if not shown:
        raise ValueError(f"nothing to draw: none of {', '.join(keys) or 'no model'} has any of {', '.join(METRICS)}")
    figure, axes = _figure(2.2 + 2.7 * min(3, len(shown)), 0.9 + 0.36 * len(keys), len(shown), sharey=True)
    for axis, name in zip(axes, shown, strict=True):
        heading, factor, decimals, share = METRICS[name]
        rows = []
        for key in keys:
            numbers = None
            if models[key].get(name) is not None:
                value, low, high = bounds(models[key][name], f"models[{key!r}][{name!r}]", share)
                numbers = (factor * value, factor * low, factor * high)
            rows.append((model_label(key, models), numbers, _colour(key, keys)))
        _bars(axis, rows, decimals)
        axis.set_title(f"{heading}\n{_READING.get(name, 'higher is better')}", fontsize=9.5, loc="left")
    if spread:
        figure.supxlabel(f"error bars: {spread}", fontsize=8.5)
    return figure


def plot_front(
    points: Mapping[str, tuple[float, tuple[float, float, float]]], path: str | Path, across: str, up: str, title: str
) -> Path:
    """Quality against time, a point a model; a line joins those that no other one beats in both.

    Args:
        points: for each label its time, and the value, low and high end of a measure of which more is better.
        path: ends in `.png` or `.svg`; both are written, and `-dark` versions of both beside them.
        across, up: what the axes are.

    Raises:
        ValueError: without a point, or for another suffix.
    """
    if not points:
        raise ValueError("nothing to draw: give a point at least")
    return _save(partial(_draw_front, points, across, up, title), path)


def _draw_front(points: Mapping[str, tuple[float, tuple[float, float, float]]], across, up, title) -> Figure:
    figure, (axis,) = _figure(7.2, 4.4, 1)
    front = pareto_front({label: (time, value) for label, (time, (value, *_)) in points.items()})
    line = [(points[label][0], points[label][1][0]) for label in front]
    axis.plot(*zip(*line, strict=True), color="#0072B2", linewidth=1.4, zorder=1)
    for label, (time, (value, low, high)) in points.items():
        colour = "#0072B2" if label in front else "#999999"
        axis.errorbar(time, value, yerr=[[value - low], [high - value]], fmt="o", color=colour, capsize=3, zorder=2)
        axis.annotate(label, (time, value), (6, -8), **_NOTE)
    axis.set_xlabel(across, fontsize=9)
    axis.set_ylabel(up, fontsize=9)
    axis.set_title(title, fontsize=10, loc="left")
    axis.margins(x=0.14)
    axis.grid(linewidth=0.8)
    return figure


def plot_bench(report: Mapping, path: str | Path) -> Path:
    """A report of `bench` as bars, a panel a request: the first token and, behind it, all further ones; a line across
    each bar is the floor of the request.

    Args:
        report: see docs/bench.md.
        path: ends in `.png` or `.svg`; both are written, and `-dark` versions of both beside them.

    Raises:
        ValueError: for another suffix.
    """
    return _save(partial(_draw_bench, report), path)


def _draw_bench(report: Mapping) -> Figure:
    requests: dict[tuple, list[Mapping]] = {}
    for row in report["rows"]:
        requests.setdefault((row["source"], row["target"], row["batch"]), []).append(row)
    most = max(map(len, requests.values()))
    figure, axes = _figure(2.4 + 4.0 * min(3, len(requests)), 1.2 + 0.3 * most, len(requests))
    for axis, ((source, target, batch), rows) in zip(axes, requests.items(), strict=True):
        rows = sorted(rows, key=lambda row: row["request_ms"]["value"])
        for position, row in enumerate(rows):
            colour = _colour("student_kd" if row["model"] == "student" else "teacher_before", [])
            first, request = row["first_token_ms"]["value"], row["request_ms"]
            axis.barh(position, first, height=0.62, color=colour)
            axis.barh(position, request["value"] - first, left=first, height=0.62, color=colour, alpha=0.55)
            spread = [[request["value"] - request["low"]], [request["high"] - request["value"]]]
            line = matplotlib.rcParams["text.color"]
            axis.errorbar(request["value"], position, xerr=spread, color=line, elinewidth=1.4, capsize=3)
            axis.vlines(row["floor"]["request_ms"], position - 0.42, position + 0.42, color="#D55E00", linewidth=2)
            axis.annotate(f"{request['value']:.0f}", (request["high"], position), (5, 0), **_NOTE)
        names = [f"{row['model']}, {row['backend']} {row['precision']}" for row in rows]
        axis.set_yticks(range(len(rows)), names)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_xlim(0, 1.2 * max(row["request_ms"]["high"] for row in rows))
        axis.set_title(f"{source} in, {target} out, batch {batch}: request, ms", fontsize=9.5, loc="left")
        axis.grid(axis="x", linewidth=0.8)
        axis.tick_params(axis="y", length=0)
    figure.supxlabel(
        "dark: first token; light: all further ones; orange: the floor on this machine\n"
        f"threads: {report['machine']['threads']}; {report['spread']}",
        fontsize=8.5,
    )
    return figure
