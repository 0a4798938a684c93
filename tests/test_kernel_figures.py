"""The figures of docs/kernels.md are legible, and docs/performance.md shows what docs/performance.json holds."""

import json
from itertools import combinations
from pathlib import Path

import matplotlib
import pytest

from docs import kernel_figures
from kernels.roofline import Row, Target, table

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("name", kernel_figures.FIGURES)
def test_every_text_is_inside_the_figure_and_apart_from_the_others(name):
    with matplotlib.rc_context(kernel_figures.STYLE):
        axes = kernel_figures.FIGURES[name]().axes
        figure = axes.figure
        figure.canvas.draw()
        boxes = {text: text.get_window_extent() for text in axes.texts}
    page = figure.bbox
    for text, box in boxes.items():
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, text.get_text()
        assert text.get_size() >= 8, text.get_text()
    for one, other in combinations(axes.texts, 2):
        assert not boxes[one].overlaps(boxes[other]), (one.get_text(), other.get_text())


def test_the_page_shows_every_figure():
    page = (DOCS / "kernels.md").read_text()
    for name in kernel_figures.FIGURES:
        assert f"](kernels/{name}.svg)" in page
        assert (DOCS / "kernels" / f"{name}.svg").exists()


def test_the_tables_and_the_missed_floors_of_the_page_are_those_measured():
    measured = json.loads((DOCS / "performance.json").read_text())
    page = (DOCS / "performance.md").read_text()
    rows = [Row(**row | {"targets": [Target(**target) for target in row["targets"]]}) for row in measured["rows"]]
    for section in {row.section for row in rows}:
        assert table([row for row in rows if row.section == section]) in page
    about_misses = page.split("## Where floors and goals are missed")[1]
    for target in (target for row in rows for target in row.targets if target.mark == "MISSED"):
        reached = f"{target.value:.1f} %" if target.unit == "%" else f"{target.value:.2f}{target.unit}"
        assert f"| {reached} |" in about_misses, str(target)


def test_every_operator_has_one_row_for_each_shape_length_and_selection():
    rows = json.loads((DOCS / "performance.json").read_text())["rows"]
    cases = [tuple(row[key] for key in ("section", "operator", "shape", "length", "indices")) for row in rows]
    assert len(set(cases)) == len(cases)


def test_the_roofline_has_a_point_for_every_operator_and_leaves_the_worst_selections_out():
    row = {"shape": "80b", "length": 8192, "indices": "", "ms": 2.0, "flops": 1e12, "bytes": 1e9}
    rows = [row | {"operator": name} for name in ("scored forward", "window backward", "FlexAttention forward")]
    rows += [row | {"operator": "sparse layer forward", "indices": kind} for kind in ("captured", "equal (hot)")]
    rows.append(row | {"operator": "sparse layer forward", "indices": "random", "ms": None})
    ceilings = {"flops": 7e14, "bandwidth": 4e12}
    figure = kernel_figures.roofline({"about": {"GPU": "H200"}, "ceilings": ceilings, "rows": rows})
    axes = figure.axes[0]
    points = [offset for dots in axes.collections for offset in dots.get_offsets().tolist()]
    assert points == [[1000.0, 500.0]] * 3
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["scored forward", "window backward", "sparse layer forward"]


def test_no_point_of_the_measured_roofline_is_cut_off():
    axes = kernel_figures.roofline(json.loads(kernel_figures.MEASURED.read_text())).axes[0]
    points = [offset for dots in axes.collections for offset in dots.get_offsets().tolist()]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert points
    assert all(left < x < right and bottom < y < top for x, y in points)
