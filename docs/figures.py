"""Draws docs/architecture.svg and .png: the hybrid blocks of a HySparse model and the inside of a sparse layer.

    python docs/figures.py [FOLDER]

One unit of the canvas is one pixel of the figure at its width in the README (900). Canvas and colours are also those of
the other figures in docs/.
"""

import math
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Polygon, Rectangle

WIDTH, HEIGHT = 900, 560
STYLE = {"font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans", "svg.hashsalt": "hysparse"}
INK, MUTED, RULE, PAPER = "#1f2933", "#52606d", "#b8c2cc", "#ffffff"
# Okabe and Ito's palette, (line, fill): told apart with any colour vision, and never by colour alone
FULL = ("#0072B2", "#d6e8f5")
SPARSE = ("#C77F00", "#fdf0d2")
SHARED = ("#00805C", "#9fdcc8")  # K and V of the full layer
BLOCKS = ("#A3487C", "#f3dbe8")  # indices of the selected blocks
OWN = ("#B84A00", "#f9c9a8")  # K' and V' of the sparse layer
GREY = ("#7b8794", "#eef1f4")
WHITE = (GREY[0], PAPER)
SELECTED = (0, 1, 5, 6, 9, 12, 13, 17, 18, 20, 24, 25, 26, 29, 30, 31)  # 16 of 32 blocks


def draw() -> Figure:
    canvas = canvas_of(HEIGHT)
    zoom(canvas)
    stack(canvas)
    sparse_layer(canvas)
    return canvas.axes.figure


class Canvas:
    """Boxes, arrows and text, in pixels; y goes up."""

    def __init__(self, axes):
        self.axes = axes

    def text(self, x, y, words, size=9.0, color=INK, **style):
        self.axes.text(x, y, words, size=size, color=color, **{"ha": "center", "va": "center", "zorder": 5} | style)

    def box(self, x, y, width, height, words="", colors=GREY, radius=5, size=9.0, line=1.3, zorder=3, **style):
        """A rounded box with its lower left corner at (x, y); the first line of words is bold if there is a second."""
        shape = f"round,pad=0,rounding_size={radius}"
        self.axes.add_patch(
            FancyBboxPatch((x, y), width, height, shape, ec=colors[0], fc=colors[1], lw=line, zorder=zorder, **style)
        )
        first, _, second = words.partition("\n")
        middle = y + height / 2
        if second:
            self.text(x + width / 2, middle + 8, first, size, weight="bold")
            self.text(x + width / 2, middle - 8, second, size - 0.5)
        elif first:
            self.text(x + width / 2, middle - 0.5, first, size)

    def cell(self, x, y, width, line, fill, zorder, height=20, **style):
        self.axes.add_patch(Rectangle((x, y), width, height, ec=line, fc=fill, lw=0.8, zorder=zorder, **style))

    def arrow(self, *points, color=INK, line=1.4, style="-", head=True):
        """Through the points, with a head at the last."""
        (x0, y0), (x1, y1) = points[-2:]
        length = math.hypot(x1 - x0, y1 - y0)
        along, across = ((x1 - x0) / length, (y1 - y0) / length), ((y0 - y1) / length, (x1 - x0) / length)
        neck = (x1 - 8 * along[0], y1 - 8 * along[1])
        path = zip(*points[:-1], neck if head else points[-1], strict=True)
        self.axes.plot(*path, color=color, lw=line, ls=style, solid_capstyle="butt", zorder=2)
        if head:
            sides = [(neck[0] + side * across[0], neck[1] + side * across[1]) for side in (-4.5, 4.5)]
            self.axes.add_patch(Polygon([(x1, y1), *sides], fc=color, lw=0, zorder=2))

    def circle(self, x, y, sign, radius=11):
        self.axes.add_patch(Circle((x, y), radius, ec=INK, fc=PAPER, lw=1.3, zorder=3))
        reach = radius * (0.5 if sign == "+" else 0.4)
        for dx, dy in [(reach, 0), (0, reach)] if sign == "+" else [(reach, reach), (reach, -reach)]:
            self.axes.plot([x - dx, x + dx], [y - dy, y + dy], color=INK, lw=1.5, zorder=4)


def canvas_of(height: int, title: str = "") -> Canvas:
    """An empty figure, `height` pixels high, with a title in its upper left corner."""
    figure = Figure(figsize=(WIDTH / 100, height / 100), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, height))
    axes.axis("off")
    canvas = Canvas(axes)
    if title:
        canvas.text(20, height - 20, title, 11, ha="left", weight="bold")
    return canvas


def stack(canvas: Canvas) -> None:
    """Left: embedding, hybrid blocks, the last full layer, head; K/V and indices rise on either side of a block."""
    left, width, middle, keys, blocks = 92, 170, 177, 52, 302
    canvas.text(20, 540, "The layers", 12, ha="left", weight="bold")
    canvas.text(334, 539, "7B: $N$ = 3,  80B-A3B: $N$ = 11", color=MUTED, ha="right")
    canvas.box(left, 18, width, 26, "token embedding")
    for bottom, height in [(64, 286), (372, 52)]:
        style = {"radius": 9, "line": 1.1, "zorder": 1, "linestyle": (0, (4, 2.5))}
        canvas.box(20, bottom, 314, height, colors=(MUTED, "#fafbfc"), **style)
    canvas.text(30, 336, "hybrid block", ha="left", weight="bold")
    canvas.text(324, 336, "1 full, $N$ sparse layers", ha="right")
    canvas.box(left, 80, width, 46, "Full layer\nKV cache and block scores", FULL)
    for bottom, name in [(172, "1"), (218, "2"), (288, "$N$")]:
        canvas.box(left, bottom, width, 30, f"Sparse layer {name}", SPARSE)
        canvas.arrow((keys, bottom + 15), (left - 1, bottom + 15), color=SHARED[0], line=2)
        canvas.arrow((blocks, bottom + 15), (left + width + 1, bottom + 15), color=BLOCKS[0], line=2, style="--")
    canvas.arrow((left, 103), (keys, 103), (keys, 303), color=SHARED[0], line=2, head=False)
    canvas.arrow((left + width, 103), (blocks - 23, 103), color=BLOCKS[0], line=2, style="--")
    canvas.arrow((blocks, 114), (blocks, 303), color=BLOCKS[0], line=2, style="--", head=False)
    canvas.box(blocks - 22, 89, 46, 28, "top 16", BLOCKS, radius=13, size=8.5)
    canvas.text(keys - 14, 210, "shared K, V", 9, SHARED[0], rotation=90, weight="bold")
    canvas.text(blocks + 15, 210, "block indices", 9, BLOCKS[0], rotation=90, weight="bold")
    canvas.text(middle, 410, "more hybrid blocks", 9, weight="bold")
    for i in range(12):
        canvas.box(95 + 14 * i, 381, 10, 15, colors=SPARSE if i % 4 else FULL, radius=2, line=1)
    canvas.box(left, 446, width, 30, "Full layer (always last)", FULL)
    canvas.box(left, 496, width, 26, "LM head")
    for start, end in [(44, 80), (126, 172), (202, 218), (318, 350), (350, 372), (424, 446), (476, 496)]:
        canvas.arrow((middle, start), (middle, end), head=end != 350)
    canvas.arrow((middle, 248), (middle, 258), head=False)
    canvas.text(middle, 268, "⋮", 11)
    canvas.arrow((middle, 277), (middle, 288))


def zoom(canvas: Canvas) -> None:
    """The wedge that says the right side is the inside of one sparse layer, and the frame of that side."""
    wedge = [(262, 318), (262, 288), (366, 14), (366, 522)]
    canvas.axes.add_patch(Polygon(wedge, fc=SPARSE[1], alpha=0.5, lw=0, zorder=1.5))
    canvas.box(366, 14, 520, 508, colors=(SPARSE[0], "#fffdf8"), radius=9, zorder=0.5)


def sparse_layer(canvas: Canvas) -> None:
    """Right: one query, two branches over their keys and a sink each, two gates, one output."""
    left, middle, right = 478, 626, 774
    canvas.text(366, 540, "The attention of a sparse layer", 12, ha="left", weight="bold")
    canvas.text(886, 539, "one token $t$, one KV head", 9, MUTED, ha="right")
    canvas.box(380, 46, 94, 30, "shared K, V", SHARED)
    canvas.box(482, 46, 94, 30, "block indices", BLOCKS)
    canvas.text(left, 31, "handed on by the full layer", 8.5, MUTED)
    canvas.box(596, 46, 276, 30, "layer input $x_t$, normalised")
    canvas.box(786, 96, 86, 26, "own $K'$, $V'$", OWN)
    canvas.arrow((427, 76), (427, 144), color=SHARED[0], line=2)
    canvas.arrow((529, 76), (529, 144), color=BLOCKS[0], line=2, style="--")
    canvas.arrow((860, 76), (860, 96))
    canvas.arrow((860, 122), (860, 144), color=OWN[0], line=2)
    keys_of_branch(canvas, left, SELECTED, SHARED)
    keys_of_branch(canvas, right, (30, 31), OWN)
    canvas.box(left - 98, 258, 196, 46, "Block-sparse attention\n16 blocks of 64 tokens, sink", SPARSE)
    canvas.box(right - 98, 258, 196, 46, "Sliding-window attention\nlast 128 tokens, sink", SPARSE)
    canvas.box(middle - 30, 267, 60, 28, "query $q'_t$", size=8.5)
    canvas.arrow((middle, 76), (middle, 267))
    canvas.arrow((middle - 30, 281), (left + 98, 281))
    canvas.arrow((middle + 30, 281), (right - 98, 281))
    for center, side, gate, gated in [
        (left, -1, r"$\tilde{g}_t = \sigma(\tilde{W} x_t)$", r"$\tilde{g}_t \odot \tilde{o}_t$"),
        (right, 1, r"$g'_t = \sigma(W' x_t)$", r"$g'_t \odot o'_t$"),
    ]:
        canvas.arrow((center, 304), (center, 345))
        canvas.circle(center, 356, "×")
        pill = middle + side * 62
        canvas.box(pill - 52, 342, 104, 28, gate, radius=13)
        canvas.arrow((pill + side * 52, 356), (center - side * 11, 356))
        canvas.arrow((center, 367), (center, 414), (middle + side * 11, 414))
        canvas.text(middle + side * 80, 427, gated)
    canvas.text(middle, 385, "sigmoid gates", 8.5, MUTED)
    canvas.circle(middle, 414, "+")
    canvas.arrow((middle, 425), (middle, 452))
    canvas.box(middle - 92, 452, 184, 30, "attention output $o_t$")
    canvas.arrow((middle, 482), (middle, 512))


def keys_of_branch(canvas: Canvas, center: float, chosen: tuple[int, ...], colors: tuple[str, str]) -> None:
    """All 32 blocks up to t, those the branch reads, and these side by side with the sink as the softmax sees them."""
    cell, low, high = 5.75, 144, 222
    row = center - 16 * cell
    gathered = center - (len(chosen) * cell + 16) / 2
    for i in range(32):
        line, fill = colors if i in chosen else (RULE, "#f3f5f7")
        canvas.cell(row + i * cell, low, cell, line, fill, 4 if i in chosen else 3)
    for place, i in enumerate(chosen):
        canvas.cell(gathered + place * cell, high, cell, *colors, 4)
        x, y = row + i * cell, gathered + place * cell
        corners = [(x, low + 20), (x + cell, low + 20), (y + cell, high), (y, high)]
        canvas.axes.add_patch(Polygon(corners, fc=colors[0], alpha=0.3, lw=0, zorder=2))
    sink = gathered + len(chosen) * cell + 5
    canvas.cell(sink, high, 11, INK, PAPER, 4, hatch="//////")
    canvas.text(sink + 17, high + 10, "sink", 8.5, ha="left")
    canvas.text(row - 8, low + 10, "1", 8.5, MUTED)
    canvas.text(row + 32 * cell + 8, low + 10, "$t$", 8.5, MUTED)
    canvas.arrow((center, high + 20), (center, 258))


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = draw()
        figure.savefig(folder / "architecture.svg", metadata={"Date": None})  # the same bytes every time
        figure.savefig(folder / "architecture.png", dpi=200)
    print(f"{folder / 'architecture.svg'} and .png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
