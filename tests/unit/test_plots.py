"""What is drawn: the artists of the figures against the numbers that went in."""

import sys

import matplotlib.colors
import matplotlib.figure
import matplotlib.image
import pytest

from hf_encdec_distill import bench
from hf_encdec_distill.bench import plot_front, plot_loss_curves, plot_quality, plots


MODELS = {
    "mine": {"n": 9, "label": "my own", "rouge_l": 0.2},
    "student_kd": {"n": 9, "rouge_l": {"value": 0.3, "low": 0.25, "high": 0.4}, "ce": 3.5},
    "teacher": {"n": 9, "rouge_l": 0.5, "ce": {"value": 2.5, "low": 2.25, "high": 2.75}},
}


@pytest.fixture
def drawn(monkeypatch):
    """The figure that the next call would have saved."""
    figures = []
    monkeypatch.setattr(plots, "_save", lambda draw, path: figures.append(draw()))
    return figures


def visible_axes(figure):
    return [axis for axis in figure.axes if axis.get_visible()]


def test_quality_bars_have_the_values_errors_and_names(drawn):
    plot_quality(MODELS, "x.png", spread="95 % interval")
    rouge, ce = visible_axes(drawn[0])
    assert [label.get_text() for label in rouge.get_yticklabels()] == [
        "teacher, tuned",
        "student, distilled",
        "my own",
    ]
    assert rouge.get_title(loc="left").startswith("ROUGE-L") and ce.get_title(loc="left").endswith("lower is better")
    assert [bar.get_width() for bar in rouge.patches] == pytest.approx([50, 30, 20])
    assert [bar.get_width() for bar in ce.patches] == pytest.approx([2.5, 3.5])
    # an error bar is drawn twice, white under dark; a plain number has none
    segments = [collection.get_segments()[0] for collection in rouge.collections]
    assert [(segment[:, 0].tolist(), segment[0, 1]) for segment in segments] == [([25, 40], 1)] * 2
    assert [text.get_text() for text in ce.texts] == ["2.500", "3.500", "not measured"]
    assert drawn[0].get_supxlabel() == "error bars: 95 % interval"
    assert len({bar.get_facecolor() for bar in rouge.patches}) == 3


def test_all_five_metrics_fit_three_to_a_row(drawn):
    row = {"n": 1, "rouge_l": 0.1, "ce": 1.0, "kl": 1.0, "teacher_agreement": 0.5, "distinct": 0.5}
    plot_quality({"student_kd": row}, "x.png")
    assert len(visible_axes(drawn[0])) == 5 and len(drawn[0].axes) == 6


def test_bars_below_zero_are_in_the_picture(drawn):
    gaps = {
        "student_kd": {"value": -0.5, "low": -0.75, "high": -0.25},
        "teacher": {"value": 0.1, "low": 0.1, "high": 0.1},
    }
    plot_quality({key: {"n": 1, "entropy_gap": gap} for key, gap in gaps.items()}, "x.png")
    (axis,) = visible_axes(drawn[0])
    left, right = axis.get_xlim()
    assert left == -0.75 and right > 0.1
    assert axis.get_title(loc="left").endswith("0: as sure as the teacher")
    assert [text.xy[0] for text in axis.texts] == [0.1, 0]  # beside the bar, never on it


def test_loss_curves_are_the_logged_rows(drawn):
    curves = {
        "student_ce": [{"step": 5, "loss": 4.0}, {"step": 10, "loss": 3.0}, {"step": 10, "eval_loss": 9.0}],
        "student_kd": [
            {"step": 5, "loss": 1.0, "ce_loss": 3.5, "distill_loss": 0.7},
            {"step": 10, "loss": 0.9, "ce_loss": 3.25, "distill_loss": 0.6},
            {"step": 10, "train_runtime": 1.0},
        ],
    }
    plot_loss_curves(curves, "x.png", labels={"student_ce": "plain"})
    ce, distillation = visible_axes(drawn[0])
    assert [line.get_xydata().tolist() for line in ce.lines] == [[[5, 4.0], [10, 3.0]], [[5, 3.5], [10, 3.25]]]
    assert [line.get_xydata().tolist() for line in distillation.lines] == [[[5, 0.7], [10, 0.6]]]
    assert [text.get_text() for text in ce.get_legend().get_texts()] == ["plain", "student, distilled"]
    # a run looks the same in every panel, and no two runs look alike, in colour or in dashes
    assert distillation.lines[0].get_color() == ce.lines[1].get_color() != ce.lines[0].get_color()
    assert ce.lines[0].get_linestyle() != ce.lines[1].get_linestyle()


POINTS = {
    "slow": (1.0, (50, 48, 51)),
    "good": (0.5, (49, 47, 50)),
    "poor": (0.6, (40, 39, 41)),
    "fast": (0.1, (30, 30, 30)),
}


def test_the_front_joins_what_nothing_beats(drawn):
    plot_front(POINTS, "x.png", across="time", up="quality", title="both")
    (axis,) = visible_axes(drawn[0])
    assert axis.lines[0].get_xydata().tolist() == [[0.1, 30], [0.5, 49], [1.0, 50]]
    assert [text.get_text() for text in axis.texts] == list(POINTS)
    spread = axis.collections[0].get_segments()[0]
    assert spread.tolist() == [[1.0, 48], [1.0, 51]]
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_title(loc="left")) == ("time", "quality", "both")


def test_files_are_pictures_written_whole_and_repeatable(tmp_path):
    names = {"a.png", "a.svg", "a-dark.png", "a-dark.svg"}
    first, second = (plot_quality(MODELS, tmp_path / folder / "a.png", "95 %").parent for folder in ("one", "two"))
    height, width, _ = matplotlib.image.imread(first / "a.png").shape
    assert width > 600 and height > 200
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()} == names
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert plot_quality(MODELS, tmp_path / "b.svg") == tmp_path / "b.svg"
    assert b"<svg" in (tmp_path / "b.svg").read_bytes()


def luminance(colour):
    """Relative luminance, WCAG 2.2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in matplotlib.colors.to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(colour, other):
    light, dark = sorted((luminance(colour), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_what_is_written_can_be_read_on_light_and_dark_pages(monkeypatch, tmp_path):
    figures = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    plot_quality(MODELS, tmp_path / "a.png", "95 %")
    light, dark = figures[0], figures[-1]
    assert luminance(light.get_facecolor()) == 1.0 and luminance(dark.get_facecolor()) == 0.0
    for figure in (light, dark):
        page = figure.get_facecolor()
        for axis in visible_axes(figure):
            texts = [*axis.texts, *axis.get_xticklabels(), *axis.get_yticklabels(), axis.title, axis._left_title]
            assert min(contrast(text.get_color(), page) for text in texts) > 4.5  # WCAG 2.2, AA
            assert min(contrast(bar.get_facecolor()[:3], page) for bar in axis.patches) > 3
            # The line of an error bar, over its halo in the colour of the page.
            halos, lines = axis.collections[::2], axis.collections[1::2]
            assert all(matplotlib.colors.same_color(halo.get_color()[0], page) for halo in halos)
            assert all(contrast(line.get_color()[0][:3], page) > 7 for line in lines)


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no training loss in the curves of student_kd"):
        plot_loss_curves({"student_kd": [{"step": 1, "eval_loss": 1.0}]}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="nothing to draw: none of teacher"):
        plot_quality({"teacher": {"n": 1}}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="give a point at least"):
        plot_front({}, tmp_path / "x.png", "", "", "")
    with pytest.raises(ValueError, match="'x.pdf'.*png or .svg"):
        plot_quality(MODELS, tmp_path / "x.pdf")
    with pytest.raises(ValueError, match="0 to 1"):
        plot_quality({"teacher": {"n": 1, "rouge_l": 32.0}}, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "hf_encdec_distill.bench.plots")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install .hf-encdec-distill\[demo\]"):
        bench.plot_quality  # noqa: B018
