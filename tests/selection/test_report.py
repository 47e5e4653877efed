"""The report page is self-contained and safe; figures have labels and say what they show."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from plumbline.selection import figures
from plumbline.selection.report import render_html, render_markdown

nan = np.nan


class Reader(HTMLParser):
    """Collects tags with their attributes, and refuses unbalanced ones."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def sections():
    curves = np.array([[0, 0.5, 1], [0, 0, 0], [1, 1, 1], [0.2, nan, 0.9]])
    figure = figures.average_learning_curve(curves, list("abcd"), np.array([0.9, -1, 0, nan]))
    return [
        {"title": "Curves <1>", "text": ["a & b", "second"], "figures": [figure]},
        {"title": "Numbers", "table": [["level", "kept"], ["x|<script>", "3 of 4"]], "note": "n = 4"},
    ]  # fmt: skip


def test_page_is_whole_and_loads_nothing(sections):
    page = render_html("Report & more", sections)
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert "a & b" in reader.text
    assert "Curves <1>" in reader.text
    assert not any(tag == "script" for tag, _ in reader.tags)
    for tag, attributes in reader.tags:
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#")), (tag, value)
    assert not re.search(r"url\(|@import|https?://", page)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in reader.tags
    images = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert len(images) == 1
    assert "epoch" in images[0]["alt"]


def test_markdown_has_the_same(sections, tmp_path):
    text = render_markdown("Report", sections, tmp_path / "figures")
    assert "| level | kept |\n| --- | ---: |\n| x\\|<script> | 3 of 4 |" in text
    assert "(figures/1-1.png)" in text
    assert (tmp_path / "figures" / "1-1.png").read_bytes().startswith(b"\x89PNG")
    assert "png" not in render_markdown("Report", sections)


def test_malformed_sections_are_refused():
    with pytest.raises(ValueError, match="needs a title"):
        render_html("x", [{"text": "no title"}])
    with pytest.raises(ValueError, match="'T' has rows of 1, 2 cells"):
        render_html("x", [{"title": "T", "table": [["a", "b"], ["c"]]}])


def drawn():
    rng = np.random.default_rng(0)
    curves = np.clip(rng.normal(0.5, 0.3, (50, 6)), 0, 1)
    scores = rng.normal(0, 1, 50)
    scores[:3] = [nan, -9, 0.6]
    kept = scores >= 0.6
    ids = [f"sample-{i}" for i in range(50)]
    return {
        "curve": figures.average_learning_curve(curves, ids, scores),
        "one sample": figures.average_learning_curve(curves[:1], ids[:1], scores[2:3]),
        "none scored": figures.average_learning_curve(curves[:1], ids[:1], scores[:1]),
        "histogram": figures.score_histogram(scores, 0.6),
        "one score": figures.score_histogram(np.array([0.5, nan]), 0.6),
        "nothing": figures.score_histogram(np.array([nan]), None),
        "groups": figures.kept_by_group([str(i % 5) for i in range(50)], kept, name="level"),
        "overlap": figures.overlap({"lim": {"a", "b"}, "random": {"b"}, "none": set()}),
    }


@pytest.mark.parametrize(
    "name", ["curve", "one sample", "none scored", "histogram", "one score", "nothing", "groups", "overlap"]
)
def test_figures_draw_with_labels(name, tmp_path):
    figure = drawn()[name]
    figure.savefig(tmp_path / "f.png")
    for axes in figure.axes:
        assert axes.get_xlabel()
        assert axes.get_ylabel()


def test_histogram_counts_every_score_once():
    scores = np.array([nan, -9, -1, 0.6, 0.59, 0.61, 1.0])
    axes = figures.score_histogram(scores, 0.6).axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == 6
    kept = sum(bar.get_height() for bar in axes.patches if bar.get_x() >= 0.6 - 1e-9)
    assert kept == 3
    assert "1 below -2" in axes.get_xlabel()


def test_learning_curve_draws_the_average_over_complete_samples():
    curves = np.array([[0, 1.0], [1, 0.0], [1, nan]])
    axes = figures.average_learning_curve(curves, list("abc"), np.array([0.5, 0.1, nan])).axes[0]
    np.testing.assert_array_equal(axes.lines[-1].get_ydata(), [0.5, 0.5])
