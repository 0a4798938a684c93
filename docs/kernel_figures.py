"""Draws the figures of docs/kernels.md, one for each kernel, and the roofline picture of docs/performance.md.

    python -m docs.kernel_figures [FOLDER]

The roofline comes from docs/performance.json, which `python -m kernels.bench --json docs/performance.json` writes.
"""

import json
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from docs.figures import BLOCKS, FULL, GREY, INK, MUTED, OWN, PAPER, SHARED, SPARSE, STYLE, Canvas

WIDTH = 900
WHITE = (GREY[0], PAPER)
MEASURED = Path(__file__).parent / "performance.json"


def canvas_of(height: int, title: str) -> Canvas:
    figure = Figure(figsize=(WIDTH / 100, height / 100), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, height))
    axes.axis("off")
    canvas = Canvas(axes)
    canvas.text(20, height - 20, title, 11, ha="left", weight="bold")
    return canvas


def query_tile(canvas: Canvas, x: float, y: float, height: float, tokens: int, words: str) -> None:
    """Neighbouring tokens, each with the heads of a group: the rows of one matrix."""
    each = height / tokens
    for i in range(tokens):
        canvas.cell(x, y + i * each, 46, FULL[0], FULL[1] if i % 2 else PAPER, 3, height=each)
    canvas.text(x + 23, y - 13, words, 8.5)


def scored_forward() -> Canvas:
    """The strip of block maxima, and what the epilogue makes of it."""
    canvas = canvas_of(330, "Scored forward: a program and its tile of queries")
    blocks, left, step, bottom, height = 9, 130, 50, 118, 128
    query_tile(canvas, 40, bottom, height, 8, "128 rows")
    canvas.text(63, bottom - 27, "tokens × heads", 8.5, MUTED)
    canvas.text(left, 294, "K and V, one block after the other", 9, SHARED[0], ha="left", weight="bold")
    for j in range(blocks):
        x, last = left + j * step, j == blocks - 1
        canvas.cell(x, 262, 42, *SHARED, 3)
        canvas.cell(
            x, bottom, 42, GREY[0], FULL[1] if j < 6 else PAPER, 3, height=height, hatch="////" if last else None
        )
        canvas.cell(x + 15, 34, 12, BLOCKS[0], BLOCKS[1] if j < 6 else PAPER, 3, height=48)
        if j < 6:
            canvas.arrow((x + 21, bottom - 2), (x + 21, 84), color=BLOCKS[0])
    canvas.arrow((86, bottom + height / 2), (left - 4, bottom + height / 2))
    canvas.text(left + 8 * step + 21, 253, "masked", 8, MUTED)
    canvas.text(
        left,
        20,
        "strip: each row's largest logit in each block, in scratch memory of its own",
        8.5,
        BLOCKS[0],
        ha="left",
    )
    right = 640
    for y, words, colors in [
        (262, "output, log-sum-exp\nat the last key", FULL),
        (196, "maximum − log-sum-exp\nof each row and block", BLOCKS),
        (130, "largest of the $G$ heads\nof a token", BLOCKS),
        (64, "best 16 blocks of a token\nties: lower block", BLOCKS),
    ]:
        canvas.box(right, y - 20, 226, 40, words, colors, size=8.5)
    canvas.arrow((left + 8 * step + 44, 230), (right - 25, 230), (right - 25, 262), (right - 1, 262))
    canvas.arrow((left + 8 * step + 29, 58), (right - 25, 58), (right - 25, 196), (right - 1, 196), color=BLOCKS[0])
    canvas.arrow((right + 113, 242), (right + 113, 216))
    canvas.arrow((right + 113, 176), (right + 113, 150), color=BLOCKS[0])
    canvas.arrow((right + 113, 110), (right + 113, 84), color=BLOCKS[0])
    canvas.arrow((right + 113, 44), (right + 113, 26), color=BLOCKS[0])
    canvas.text(right + 120, 15, "indices: all that remains of the scores", 8.5, BLOCKS[0])
    return canvas


TOKENS = (FULL, SPARSE, BLOCKS, OWN)  # colours of the four tokens of a tile
CHOICE = ((0, 2, 5, 9), (0, 2, 6, 9), (0, 5, 6, 9), (0, 2, 8, 9))  # blocks that each of them chose, of ten


def index_build() -> Canvas:
    """One selection, two orders."""
    canvas = canvas_of(
        330, "Index build: once per hybrid block, read by all of its sparse layers, forward and backward"
    )
    canvas.text(20, 280, "selection of a tile of four tokens", 9, ha="left", weight="bold")
    for i, (chosen, colors) in enumerate(zip(CHOICE, TOKENS, strict=True)):
        y = 232 - 32 * i
        canvas.text(44, y + 10, f"$t_{i}$", 9)
        for j in range(10):
            canvas.cell(64 + 22 * j, y, 20, *(colors if j in chosen else WHITE), 3)
    for j in range(10):
        canvas.text(74 + 22 * j, 264, str(j), 8, MUTED)
    canvas.text(174, 118, "key blocks; the tile lies in block 9", 8.5, MUTED)
    canvas.arrow((296, 216), (350, 240))
    canvas.arrow((296, 160), (350, 110))

    canvas.text(360, 280, "union of the tile, for forward and dQ", 9, SHARED[0], ha="left", weight="bold")
    union = sorted(set().union(*CHOICE))
    for place, block in enumerate(union):
        x = 366 + 46 * place + (18 if block == 9 else 0)
        canvas.box(x, 236, 36, 26, str(block), SHARED, radius=2)
        for i, (chosen, colors) in enumerate(zip(CHOICE, TOKENS, strict=True)):
            canvas.cell(x + 9 * i, 218, 9, *(colors if block in chosen else WHITE), 3, height=12)
    canvas.text(366, 204, "seen whole: no element is masked", 8.5, MUTED, ha="left")
    canvas.text(614, 204, "in part", 8.5, MUTED, ha="left")
    canvas.text(690, 249, "sorted block numbers", 8.5, MUTED, ha="left")
    canvas.text(690, 224, "one bit for each token", 8.5, MUTED, ha="left")

    canvas.text(360, 166, "tokens of each key block, for dK and dV", 9, SHARED[0], ha="left", weight="bold")
    rows = ((0, 44, ("item 0", "item 1", "item 2")), (1, 5, ("item 3",)), (2, 21, ("item 4", "item 5")))
    for i, (block, entries, items) in enumerate(rows):
        y = 126 - 38 * i
        canvas.box(366, y, 36, 26, str(block), SHARED, radius=2)
        for entry in range(entries):
            canvas.cell(414 + 8 * entry, y + 3, 8, INK, TOKENS[entry * 7 % 4][1], 3)
        for place, item in enumerate(items):
            x, end = 414 + 128 * place, 414 + min(128 * (place + 1), 8 * entries)
            canvas.axes.plot([x + 2, end - 2], [y - 2, y - 2], color=INK, lw=1.6)
            canvas.text((x + end) / 2, y - 9, item, 8, MUTED)
    canvas.text(
        300,
        18,
        "ascending, by one stable sort; a block that many chose makes several work items",
        8.5,
        MUTED,
        ha="left",
    )
    return canvas


def sparse_forward() -> Canvas:
    """Two softmaxes over two short lists of keys, one gated output."""
    canvas = canvas_of(310, "Sparse layer forward: a program and its tile of queries")
    query_tile(canvas, 30, 110, 96, 4, "64 rows")
    canvas.text(53, 83, "tokens × heads", 8.5, MUTED)
    union = sorted(set().union(*CHOICE))
    for lane, words, y, colors in [
        (0, "union of the selected blocks, from the shared K, V", 222, SHARED),
        (1, "window, from the layer's own $K'$, $V'$", 84, OWN),
    ]:
        canvas.text(130, y + 36, words, 9, colors[0], ha="left", weight="bold")
        canvas.arrow((80, 158), (104, 158), (104, y + 10), (126, y + 10))
        for place in range(3 if lane else len(union)):
            x = 132 + 46 * place
            label = ("w−2", "w−1", "w")[place] if lane else str(union[place])
            canvas.box(x, y - 3, 40, 26, label, colors, radius=2, size=8.5)
            for i, (chosen, token) in enumerate(zip(CHOICE, TOKENS, strict=True)):
                here = lane or union[place] in chosen
                canvas.cell(x + 10 * i, y - 19, 10, *(token if here else WHITE), 3, height=12)
        end = 132 + 46 * (3 if lane else len(union))
        canvas.box(500, y - 13, 128, 46, "online softmax\nstarts at the sink", SPARSE, size=8.5)
        canvas.arrow((end, y + 10), (499, y + 10), color=colors[0], line=2)
        canvas.arrow((629, y + 10), (664, y + 10))
        canvas.circle(676, y + 10, "×")
        canvas.arrow((676, y + 10 + (-44 if lane else 44)), (676, y + 10 + (-12 if lane else 12)))
        canvas.text(676, y + 10 + (-54 if lane else 54), "gate $g'$" if lane else r"gate $\tilde{g}$", 8.5)
        canvas.arrow((688, y + 10), (722, y + 10), (722, 175 if not lane else 151))
    canvas.text(
        132, 190, "a row that did not choose the block takes ∞ as its pivot: it adds exp(−∞) = 0", 8.5, MUTED, ha="left"
    )
    canvas.text(132, 50, "element masks here, and in the blocks that a token sees in part", 8.5, MUTED, ha="left")
    canvas.circle(722, 163, "+")
    canvas.arrow((734, 163), (772, 163))
    canvas.box(773, 145, 110, 36, "one output", FULL)
    canvas.text(628, 24, "kept for backward: both branches' outputs and log-sum-exps", 8.5, MUTED)
    return canvas


def sparse_backward() -> Canvas:
    """Three owners of three sums."""
    canvas = canvas_of(356, "Sparse layer backward: every sum has one owner and one order")
    for y, title, words, colors in [
        (248, "by query tile", "walks its union of blocks, then its window", FULL),
        (148, "by work item of a key block", "gathers the tokens that chose the block, in ascending order", SHARED),
        (48, "by tile of window keys", "walks the queries that see it", OWN),
    ]:
        canvas.text(24, y + 60, title, 9.5, colors[0], ha="left", weight="bold")
        canvas.text(24, y + 42, words, 8.5, MUTED, ha="left")
    query_steps = [("$\\Delta$ of both branches", 130), ("gates, sinks", 104), ("dQ: 3 products a block", 160)]
    x = 24
    for words, width in query_steps:
        canvas.box(x, 254, width, 26, words, FULL, size=8.5)
        x += width + 22
        canvas.arrow((x - 22, 267), (x - 1, 267))
    canvas.text(488, 267, r"hands $\Delta$ and log-sum-exps to both kernels below", 8.5, MUTED, ha="left")
    for place in range(3):
        canvas.box(24 + 130 * place, 154, 112, 26, f"item {place}: FP32", SHARED, size=8.5)
    canvas.arrow((396, 167), (452, 167))
    canvas.box(453, 149, 130, 36, "added up in order\nFP32 dK, dV", SHARED, size=8.5)
    canvas.arrow((584, 167), (632, 167), color=SHARED[0], line=2)
    canvas.box(633, 142, 112, 50, "sum over the\n$N$ sparse layers", SHARED, size=8.5)
    canvas.arrow((746, 167), (778, 167), color=SHARED[0], line=2)
    canvas.box(779, 142, 106, 50, "full layer\nadds, casts once", FULL, size=8.5)
    canvas.box(24, 54, 190, 26, "dK$'$, dV$'$: 4 products a tile", OWN, size=8.5)
    canvas.text(24, 20, "no atomics anywhere: two runs give the same bits", 8.5, MUTED, ha="left")
    return canvas


def decode() -> Canvas:
    """One new token of each sequence."""
    canvas = canvas_of(320, "Decoding: one new token; both operators read each needed key and value once")
    canvas.text(20, 263, "full layer", 9.5, FULL[0], ha="left", weight="bold")
    canvas.text(20, 247, "split-KV", 8.5, MUTED, ha="left")
    for part in range(4):
        for j in range(3):
            canvas.cell(120 + 88 * part + 26 * j, 246, 26, *SHARED, 3)
        canvas.arrow((159 + 88 * part, 244), (159 + 88 * part, 222))
        canvas.box(122 + 88 * part, 186, 74, 35, "output, lse\nmaxima", BLOCKS, size=8.5)
        canvas.arrow((159 + 88 * part, 185), (159 + 88 * part, 168), (500, 168), head=False, line=1.1)
    canvas.arrow((480, 168), (523, 168))
    canvas.text(
        120, 279, "KV cache of a sequence, in parts: each is one program for each KV head", 8.5, MUTED, ha="left"
    )
    canvas.box(524, 148, 170, 40, "outputs weighed\nmaxima − final lse, best 16", FULL, size=8.5)
    canvas.arrow((695, 168), (717, 168), (717, 191), (740, 191))
    canvas.arrow((717, 168), (717, 155), (740, 155))
    canvas.box(741, 178, 120, 26, "output", FULL, size=8.5)
    canvas.box(741, 142, 120, 26, "block indices", BLOCKS, size=8.5)
    canvas.text(20, 108, "sparse layer", 9.5, SPARSE[0], ha="left", weight="bold")
    canvas.text(20, 92, "one launch", 8.5, MUTED, ha="left")
    chosen = (0, 2, 5, 6, 9, 11)
    for j in range(12):
        canvas.cell(120 + 22 * j, 84, 22, *(SHARED if j in chosen else WHITE), 4 if j in chosen else 3)
    for j in range(4):
        canvas.cell(410 + 14 * j, 84, 14, *OWN, 3)
    canvas.text(252, 70, "selected blocks, contiguous or in pages", 8.5, MUTED)
    canvas.text(438, 70, "ring buffer", 8.5, MUTED)
    canvas.arrow((801, 142), (801, 128), (252, 128), (252, 106), color=BLOCKS[0], line=2, style="--")
    canvas.arrow((468, 94), (515, 94))
    canvas.box(516, 74, 190, 40, "two softmaxes\ntwo sinks, two gates, one sum", SPARSE, size=8.5)
    canvas.arrow((707, 94), (740, 94))
    canvas.box(741, 81, 120, 26, "output", SPARSE, size=8.5)
    canvas.text(
        20,
        26,
        "a program has a sequence and a KV head; the $G$ heads of its group are the rows of every product",
        8.5,
        MUTED,
        ha="left",
    )
    return canvas


FIGURES = {
    "scored_forward": scored_forward,
    "index_build": index_build,
    "sparse_forward": sparse_forward,
    "sparse_backward": sparse_backward,
    "decode": decode,
}
OPERATOR_COLORS = {  # by the first words of a row's operator
    "scored forward": FULL[0],
    "causal backward": "#56B4E9",
    "sparse layer forward": SPARSE[0],
    "sparse layer backward": OWN[0],
    "window forward": SHARED[0],
    "window backward": "#6FC9A5",
    "decode": BLOCKS[0],
    "cuDNN": GREY[0],
}
MARKERS = {"80b": "o", "7b": "s"}
UNTYPICAL = ("disjoint (worst)", "equal (hot)")  # selections that would crowd the picture


def roofline(measured: dict) -> Figure:
    """Useful TFLOP/s over useful FLOPs per compulsory byte, under the two ceilings of the same run."""
    figure = Figure(figsize=(WIDTH / 100, 5.2), facecolor=PAPER, layout="constrained")
    axes = figure.subplots()
    peak, bandwidth = measured["ceilings"]["flops"], measured["ceilings"]["bandwidth"]
    ridge, points, labels = peak / bandwidth, [], {}
    for row in measured["rows"]:
        color = next((c for words, c in OPERATOR_COLORS.items() if row["operator"].startswith(words)), None)
        both = "forward + backward" in row["operator"]
        if color is None or both or not (row["ms"] and row["flops"] and row["bytes"]) or row["indices"] in UNTYPICAL:
            continue
        intensity, rate = row["flops"] / row["bytes"], row["flops"] / row["ms"] / 1e9
        points.append(intensity)
        label = next(words for words in OPERATOR_COLORS if row["operator"].startswith(words))
        size = {8192: 26, 32768: 52}.get(row["length"], 84)
        axes.scatter(intensity, rate, size, color, marker=MARKERS[row["shape"]], ec=PAPER, lw=0.7, zorder=3)
        labels.setdefault(label, axes.scatter([], [], 52, color))
    low, high = min([*points, ridge]) / 2, max([*points, ridge]) * 2
    line = [low, ridge, high]
    axes.plot(line, [min(peak, x * bandwidth) / 1e12 for x in line], color=INK, lw=1.5)
    axes.text(high / 1.1, peak / 1e12 * 1.07, f"{peak / 1e12:.0f} TFLOP/s, 8192³ BF16 product", ha="right", size=9)
    axes.text(ridge / 3.3, ridge / 3 * bandwidth / 1e12, f"{bandwidth / 1e12:.1f} TB/s, copy", ha="right", size=9)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low * bandwidth / 1e12 / 1.5, peak / 1e12 * 1.5))
    axes.set_xlabel("useful FLOPs per byte that has to move")
    axes.set_ylabel("useful TFLOP/s")
    axes.grid(color=GREY[1], which="both", zorder=0)
    shapes = [axes.scatter([], [], 40, MUTED, marker=marker, label=name) for name, marker in MARKERS.items()]
    lengths = [axes.scatter([], [], size, MUTED, label=name) for name, size in (("8K", 26), ("32K", 52), ("128K", 84))]
    axes.add_artist(axes.legend(handles=[*shapes, *lengths], loc="lower right", frameon=False, fontsize=9))
    axes.legend(labels.values(), labels.keys(), loc="upper left", bbox_to_anchor=(0, 0.97), frameon=False, fontsize=9)
    axes.set_title(f"Kernels on one {measured['about']['GPU']}", loc="left", size=11, weight="bold")
    return figure


def main(folder: Path) -> None:
    (folder / "kernels").mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, draw in FIGURES.items():
            file = folder / "kernels" / f"{name}.svg"
            draw().axes.figure.savefig(file, metadata={"Date": None})  # the same bytes every time
            print(file)
        if MEASURED.exists():
            roofline(json.loads(MEASURED.read_text())).savefig(folder / "roofline.png", dpi=200)
            print(folder / "roofline.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
