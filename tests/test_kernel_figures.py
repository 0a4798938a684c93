"""The figures of docs/kernels.md are legible, and the page shows them all."""

from itertools import combinations
from pathlib import Path

import matplotlib
import pytest

from docs import kernel_figures

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
