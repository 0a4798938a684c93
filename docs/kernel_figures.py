"""Draws the figures of docs/kernels.md, one for each kernel.

    python -m docs.kernel_figures [FOLDER]

They become FOLDER/kernels/NAME.svg, FOLDER being docs/ unless it is given.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from docs.figures import BLOCKS, FULL, GREY, INK, MUTED, OWN, PAPER, SHARED, SPARSE, STYLE, Canvas

WIDTH = 900
WHITE = (GREY[0], PAPER)


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


CHUNKS = (FULL, SPARSE)  # colours of two chunks of queries
CHOICE = (  # blocks that eight tokens chose among six, by falling score; four tokens make a chunk
    *((0, 2, 3), (3, 0, 1), (2, 3, 0), (3, 1, 2)),
    *((5, 0, 3), (0, 5, 2), (3, 5, 0), (5, 1, 3)),
)


def index_build() -> Canvas:
    """One selection, sorted once."""
    canvas = canvas_of(
        318, "Index build: once per hybrid block, read by all of its sparse layers, forward and backward"
    )
    canvas.text(20, 266, "selection", 9, ha="left", weight="bold")
    canvas.text(119, 250, "key blocks", 8.5, MUTED)
    for j in range(6):
        canvas.text(64 + 22 * j, 233, str(j), 8, MUTED)
    for i, chosen in enumerate(CHOICE):
        y = 202 - 21 * i - 10 * (i // 4)
        canvas.text(36, y + 9, f"$t_{i}$", 9)
        for j in range(6):
            canvas.cell(54 + 22 * j, y, 20, *(CHUNKS[i // 4] if j in chosen else WHITE), 3, height=19)
    for w in range(2):
        canvas.text(212, 179 - 94 * w, f"chunk {w}", 8.5, CHUNKS[w][0], rotation=90)
    canvas.arrow((228, 132), (300, 132))
    canvas.text(264, 145, "stable sort", 8.5)

    canvas.text(316, 266, "choices by chunk, then block, then token", 9, ha="left", weight="bold")
    for w, colors in enumerate(CHUNKS):
        y, x = 190 - 100 * w, 320
        for block in range(6):
            tokens = [i for i in range(4 * w, 4 * w + 4) if block in CHOICE[i]]
            if not tokens:
                continue
            width = 34 * len(tokens)
            canvas.text(x + width / 2, y + 38, f"block {block}" if len(tokens) > 1 else str(block), 8.5, SHARED[0])
            for token in tokens:
                canvas.cell(x, y, 34, *colors, 3, height=26)
                canvas.text(x + 17, y + 13, f"{token}, {CHOICE[token].index(block)}", 8.5)
                x += 34
            canvas.axes.plot([x - width, x - width], [y - 7, y + 30], color=INK, lw=1.6, zorder=4)
            x += 10
        canvas.axes.plot([x - 10, x - 10], [y - 7, y + 30], color=INK, lw=1.6, zorder=4)
    canvas.box(317, 182, 109, 41, colors=(BLOCKS[0], "none"), line=2, zorder=4)
    canvas.arrow((371, 181), (371, 168), color=BLOCKS[0])
    canvas.text(
        320,
        157,
        "what one program works on: queries of one chunk that chose one block, up to 4,096 rows",
        8.5,
        BLOCKS[0],
        ha="left",
    )
    canvas.text(320, 64, "a choice: the token, and the place of the block in the token's list", 8.5, MUTED, ha="left")
    canvas.text(320, 45, "thick lines: the bounds, found by bisection", 8.5, MUTED, ha="left")
    canvas.text(
        20,
        18,
        "the programs of a chunk run at the same time and gather from its queries alone, which the L2 cache holds",
        8.5,
        MUTED,
        ha="left",
    )
    return canvas


def part_grid(canvas: Canvas, x: float, y: float, height: float) -> None:
    """What the choices of chunk 0 left, a row for each token; those of block 0 filled."""
    for i, chosen in enumerate(CHOICE[:4]):
        for place, block in enumerate(chosen):
            colors = SHARED if block == 0 else WHITE
            canvas.cell(x + 34 * place, y - height * i, 34, *colors, 3, height=height)
            canvas.text(x + 34 * place + 17, y - height * i + height / 2, str(block), 8, INK if block == 0 else MUTED)


def sparse_forward() -> Canvas:
    """By key block, then by query."""
    canvas = canvas_of(384, "Sparse layer forward: by key block, then by query")
    canvas.text(
        20, 332, "1  a program has one block and queries of one chunk", 9.5, SHARED[0], ha="left", weight="bold"
    )
    for i, chosen in enumerate(CHOICE[:4]):
        y = 286 - 22 * i
        canvas.cell(44, y, 46, *(FULL if 0 in chosen else WHITE), 3, height=22)
        canvas.text(30, y + 11, f"$t_{i}$", 9)
        if 0 in chosen:
            canvas.arrow((92, y + 11), (150, y + 6))
            canvas.cell(152, y - 5, 46, *FULL, 3, height=22)
            canvas.text(175, y + 6, f"$t_{i}$", 8.5)
    canvas.text(67, 205, "queries", 8.5, MUTED)
    canvas.text(175, 220, "gathered:", 8.5, MUTED)
    canvas.text(175, 205, "tokens × heads", 8.5, MUTED)
    canvas.box(252, 284, 130, 28, "K, V of block 0", SHARED)
    canvas.arrow((317, 283), (317, 271), color=SHARED[0], line=2)
    canvas.box(252, 226, 130, 44, "one softmax\nover this block alone", SHARED, size=8.5)
    canvas.arrow((200, 248), (251, 248))
    canvas.arrow((383, 248), (462, 248))
    canvas.text(423, 260, "scatter", 8.5)
    part_grid(canvas, 484, 286, 22)
    for i in range(4):
        canvas.text(474, 297 - 22 * i, f"$t_{i}$", 9)
    canvas.text(535, 205, "places in a token's list", 8.5, MUTED)
    canvas.text(602, 292, "each choice leaves", 8.5, ha="left", weight="bold")
    canvas.text(602, 274, "an output of its own, normalised, BF16", 8.5, ha="left")
    canvas.text(602, 257, "its log-sum-exp, FP32", 8.5, ha="left")
    canvas.text(602, 235, "as many KV heads at a time as fit", 8.5, MUTED, ha="left")
    canvas.text(602, 219, "into 6 GiB of scratch, one at least", 8.5, MUTED, ha="left")

    canvas.text(20, 170, "2  a program has a tile of neighbouring queries", 9.5, SPARSE[0], ha="left", weight="bold")
    for lane, words, y, colors in [
        (0, "what the tile's choices left", 118, SHARED),
        (1, "window, from the layer's own $K'$, $V'$", 42, OWN),
    ]:
        canvas.text(24, y + 30, words, 8.5, colors[0], ha="left")
        for place in range(3):
            x = 26 + 46 * place
            label = ("w−2", "w−1", "w")[place] if lane else f"place {place}"
            canvas.box(x, y - 3, 42, 24, label, colors, radius=2, size=8)
        canvas.arrow((168, y + 9), (251, y + 9), color=colors[0], line=2)
        first = "online softmax\nstarts at the sink" if lane else "added up by weight\nthe sink is one of them"
        canvas.box(252, y - 14, 150, 46, first, SPARSE, size=8.5)
        canvas.arrow((403, y + 9), (472, y + 9))
        canvas.circle(484, y + 9, "×")
        canvas.text(484, y + (-14 if lane else 32), "gate $g'$" if lane else r"gate $\tilde{g}$", 8.5)
        canvas.arrow((496, y + 9), (560, y + 9), (560, 77 if lane else 101))
    canvas.circle(560, 89, "+")
    canvas.arrow((572, 89), (620, 89))
    canvas.box(621, 71, 110, 36, "one output", FULL)
    canvas.text(450, 12, "kept for backward: both branches' outputs and log-sum-exps", 8.5, MUTED)
    return canvas


def sparse_backward() -> Canvas:
    """Each sum has one owner."""
    canvas = canvas_of(424, "Sparse layer backward: every sum has one owner and one order")
    for y, title, words, colors in [
        (348, "1  by row", "of a query and a head", FULL),
        (248, "2  by key block", "and piece of the queries,", SHARED),
        (142, "3  by query", "a tile of neighbours", FULL),
        (52, "4  by key block", "", SHARED),
    ]:
        canvas.text(24, y + 22, title, 9.5, colors[0], ha="left", weight="bold")
        canvas.text(24, y + 4, words, 8.5, MUTED, ha="left")
    canvas.text(24, 236, "queries gathered again", 8.5, MUTED, ha="left")
    for x, width, words in [
        (190, 170, r"$\Delta$ of both branches"),
        (376, 190, "log-sum-exp − log gate"),
        (582, 140, "gradients of sinks"),
    ]:
        canvas.box(x, 346, width, 28, words, FULL, size=8.5)
    canvas.arrow((275, 345), (275, 297))
    canvas.arrow((460, 345), (460, 320), (315, 320), (315, 297))
    canvas.box(190, 240, 190, 56, "five products a step\nK, V of the block stay in place", SHARED, size=8.5)
    canvas.box(456, 272, 204, 30, "dK, dV of each piece, FP32", SHARED, size=8.5)
    canvas.box(456, 228, 204, 30, "dQ of each choice, BF16", BLOCKS, size=8.5)
    canvas.arrow((381, 280), (455, 287), color=SHARED[0], line=2)
    canvas.arrow((381, 256), (455, 243), color=BLOCKS[0], line=2)
    canvas.text(694, 287, "queries in ascending order", 8.5, MUTED, ha="left")
    canvas.text(694, 243, "at (token, place), as forward", 8.5, MUTED, ha="left")

    canvas.arrow((490, 227), (490, 206), (310, 206), (310, 183), color=BLOCKS[0], line=2)
    canvas.box(190, 136, 240, 46, "dQ of a token's choices, in order\nplus the dQ of its window", FULL, size=8.5)
    canvas.arrow((431, 159), (489, 159))
    canvas.box(490, 144, 70, 30, "dQ", FULL)
    canvas.box(694, 136, 184, 46, "dK$'$, dV$'$ of the window\nby the kernel of window.py", OWN, size=8.5)

    canvas.arrow((661, 287), (677, 287), (677, 112), (310, 112), (310, 91), color=SHARED[0], line=2)
    canvas.box(190, 44, 240, 46, "pieces added up, in order\nFP32 dK, dV", SHARED, size=8.5)
    canvas.arrow((431, 67), (489, 67), color=SHARED[0], line=2)
    canvas.box(490, 44, 140, 46, "sum over the\n$N$ sparse layers", SHARED, size=8.5)
    canvas.arrow((631, 67), (693, 67), color=SHARED[0], line=2)
    canvas.box(694, 44, 140, 46, "full layer\nadds, casts once", FULL, size=8.5)
    canvas.text(24, 16, "no atomics anywhere: two runs give the same bits", 8.5, MUTED, ha="left")
    return canvas


def tile_matrix(canvas: Canvas, x: float, y: float, sees, row: int, column: int) -> None:
    """Eight tiles of queries by eight of keys, the first query on top; `sees(i, j)` is "", "all" or "some".

    The tiles of one row are filled in one colour, those of one column in another.
    """
    for i in range(8):
        for j in range(8):
            colors = {row: FULL}.get(i) or {column: SHARED}.get(j) or GREY
            if sees(i, j):
                edge = {"hatch": "////"} if sees(i, j) == "some" else {}
                canvas.cell(x + 26 * j, y + 26 * (7 - i), 26, *colors, 3, height=26, **edge)
    canvas.text(x + 104, y + 220, "keys", 8.5, MUTED)
    canvas.text(x - 12, y + 104, "queries", 8.5, MUTED, rotation=90)


def caption(canvas: Canvas, x: float, y: float, title: str, lines: Sequence[str], color: str) -> None:
    canvas.text(x, y, title, 9.5, color, ha="left", weight="bold")
    for i, line in enumerate(lines):
        canvas.text(x, y - 20 - 16 * i, line, 8.5, ha="left")


def causal_backward() -> Canvas:
    """The walk of a tile of keys, and the order in which a tile of rows gets its sum."""
    canvas = canvas_of(348, "Backward of full attention on Hopper: one kernel, and an order for what many add to")

    def sees(i: int, j: int) -> str:  # two documents, the second begins behind the fifth tile
        return "" if j > i or i >= 5 > j else "some" if i == j else "all"

    tile_matrix(canvas, 40, 62, sees, -1, 1)
    canvas.arrow((40 + 26 * 1.5, 62 + 26 * 2.1), (40 + 26 * 1.5, 62 + 26 * 2.9), color=SHARED[0], line=2)
    caption(canvas, 264, 256, "a program", ("K, V of a tile stay in place", "rows of queries go by"), SHARED[0])
    canvas.box(264, 142, 200, 46, "5 products a step\nscores, dP, dV, dK, dQ", SHARED, size=8.5)
    canvas.arrow((364, 141), (364, 111), color=SHARED[0], line=2)
    canvas.box(264, 64, 200, 46, "dK, dV in registers\n+ $N$ sparse layers', rounded once", SHARED, size=8.5)
    canvas.text(40, 44, "hatched: masked element by element", 8.5, MUTED, ha="left")
    canvas.text(
        40, 26, "a walk begins where the document ends: here are two, of five and three tiles", 8.5, MUTED, ha="left"
    )

    canvas.text(500, 272, "dQ of a tile of rows", 9.5, FULL[0], ha="left", weight="bold")
    canvas.text(500, 256, "the tiles of keys that it sees add one after the other", 8.5, MUTED, ha="left")
    for j in range(4):
        x = 500 + 92 * j
        canvas.box(x, 186, 76, 46, f"keys {j}\nFP32 sum", SHARED, size=8.5)
        canvas.arrow((x + 38, 185), (x + 38, 139), color=SHARED[0], line=2)
        canvas.text(x + 44, 161, f"turn {j}", 8.5, BLOCKS[0], ha="left")
    canvas.box(500, 92, 352, 46, "dQ in global memory, FP32: the copy engine adds", FULL, size=8.5)
    canvas.text(500, 70, "a counter of the tile says whose turn it is", 8.5, BLOCKS[0], ha="left")
    canvas.text(500, 52, "programs start in this order: what one waits for runs", 8.5, MUTED, ha="left")
    return canvas


def window() -> Canvas:
    """The band that a window leaves."""
    canvas = canvas_of(336, "Sliding window: every long operand is read once")

    def sees(i: int, j: int) -> str:  # a window of two tiles: the first and the last of three are cut
        return {0: "some", 1: "all", 2: "some"}.get(i - j, "")

    for x, row, column in ((40, 4, -1), (480, -1, 3)):
        tile_matrix(canvas, x, 50, sees, row, column)
    of_queries = "a tile of queries stays in place", "the few keys they see go by"
    of_keys = "a tile of keys stays in place", "the queries that see it go by"
    caption(canvas, 264, 244, "forward, and dQ", of_queries, FULL[0])
    caption(canvas, 704, 244, "dK$'$, dV$'$", of_keys, SHARED[0])
    canvas.box(264, 130, 176, 46, "online softmax\nstarts at the sink", FULL, size=8.5)
    canvas.box(264, 70, 176, 46, "dQ leaves delta\nand the sink's gradient", FULL, size=8.5)
    canvas.box(704, 130, 176, 46, "transposed scores\nP, dS stay in registers", SHARED, size=8.5)
    canvas.arrow((441, 93), (460, 93), (460, 40), (792, 40), (792, 129), line=1.1)
    canvas.text(626, 28, "delta of each row", 8.5, MUTED)
    canvas.text(40, 28, "hatched: an edge of the window or the diagonal cuts the tile", 8.5, MUTED, ha="left")
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
    "causal_backward": causal_backward,
    "index_build": index_build,
    "sparse_forward": sparse_forward,
    "sparse_backward": sparse_backward,
    "window": window,
    "decode": decode,
}


def main(folder: Path) -> None:
    (folder / "kernels").mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, draw in FIGURES.items():
            file = folder / "kernels" / f"{name}.svg"
            draw().axes.figure.savefig(file, metadata={"Date": None})  # the same bytes every time
            print(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
