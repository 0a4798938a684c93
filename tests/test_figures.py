"""The architecture figure is legible, says 16 blocks where it shows 16, and is drawn the same every time."""

import runpy
from itertools import combinations
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(DOCS / "figures.py"))


def test_every_text_is_inside_the_figure_apart_from_the_others_and_large_enough(script):
    figure = script["draw"]()
    figure.canvas.draw()
    texts = figure.axes[0].texts
    boxes = {text: text.get_window_extent() for text in texts}
    page = figure.bbox
    for text, box in boxes.items():
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, text.get_text()
        assert text.get_size() >= 8, text.get_text()  # points; the figure is 9 inches, 900 pixels, wide
    for one, other in combinations(texts, 2):
        assert not boxes[one].overlaps(boxes[other]), (one.get_text(), other.get_text())


def test_as_many_blocks_are_selected_as_the_label_says(script):
    labels = [text.get_text() for text in script["draw"]().axes[0].texts]
    assert f"{len(set(script['SELECTED']))} blocks of 64 tokens, sink" in labels


def test_the_script_draws_the_same_files_again(script, tmp_path):
    for name in ("one", "other"):
        script["main"](tmp_path / name)
    for file in ("architecture.svg", "architecture.png"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
