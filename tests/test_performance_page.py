"""docs/performance.md and its picture show what docs/performance.json holds."""

import json
from pathlib import Path

from docs import roofline_figure
from kernels.roofline import Row, Target, table

DOCS = Path(__file__).parents[1] / "docs"


def test_the_tables_and_the_missed_floors_of_the_page_are_those_measured():
    measured = json.loads((DOCS / "performance.json").read_text())
    page = (DOCS / "performance.md").read_text()
    rows = [Row(**row | {"targets": [Target(**target) for target in row["targets"]]}) for row in measured["rows"]]
    for section in {row.section for row in rows}:
        assert table([row for row in rows if row.section == section]) in page
    about_misses = page.split("## Where goals are missed")[1]
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
    figure = roofline_figure.roofline({"about": {"GPU": "H200"}, "ceilings": ceilings, "rows": rows})
    axes = figure.axes[0]
    points = [offset for dots in axes.collections for offset in dots.get_offsets().tolist()]
    assert points == [[1000.0, 500.0]] * 3
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["scored forward", "window backward", "sparse layer forward"]


def test_no_point_of_the_measured_roofline_is_cut_off():
    axes = roofline_figure.roofline(json.loads(roofline_figure.MEASURED.read_text())).axes[0]
    points = [offset for dots in axes.collections for offset in dots.get_offsets().tolist()]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert points
    assert all(left < x < right and bottom < y < top for x, y in points)
