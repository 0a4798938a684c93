"""Draws the figures of docs/kernels.md, one for each kernel.

    python -m docs.kernel_figures [FOLDER]

They become FOLDER/kernels/NAME.svg, FOLDER being docs/ unless it is given.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

from docs.figures import BLOCKS, FULL, GREY, INK, MUTED, OWN, PAPER, SHARED, SPARSE, STYLE, WHITE, Canvas, canvas_of
from docs.sparse_figures import index_build, sparse_backward, sparse_forward


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


def rotary() -> Canvas:
    """Some rows of the projection's output, and the way of each part, forward and back."""
    canvas = canvas_of(366, "Projection to attention: one pass over memory in each direction")
    parts = [  # left and right end, names of the tensors, numbers in a row, shape, colours
        (108, 404, ("query",), "$G$ heads of $D$ numbers", "[S, B, H, D]", FULL),
        (404, 478, ("key",), "$D$", "[S, B, K, D]", OWN),
        (478, 552, ("value",), "$D$", "[S, B, K, D]", OWN),
        (552, 636, (r"$\tilde{g}$", "$g'$"), "gates, $G$ each", "[S, B, H]", SPARSE),
    ]
    back = {"color": BLOCKS[0], "style": (0, (2, 1.5))}
    canvas.text(20, 304, "$y$ [S, B, K, R]", 9, ha="left", weight="bold")
    for row in range(6):
        token, kv_head = divmod(row, 2)
        y = 274 - 16 * row
        if not kv_head:
            canvas.text(28, y, f"$t_{token}$", 9)
        canvas.text(102, y + 8, f"KV head {kv_head}", 8, MUTED if kv_head else INK, ha="right")
        for left, right, names, *_, colors in parts:
            cells = 4 if names == ("query",) else len(names)
            width = (right - left) / cells
            for i in range(cells):
                canvas.cell(left + width * i, y, width, *(WHITE if kv_head else colors), 3, height=16)
    for left, right, names, numbers, shape, colors in parts:
        middle, width = (left + right) / 2, (right - left) / len(names)
        canvas.text(middle, 304, numbers, 8.5, colors[0])
        canvas.text(middle, 56, shape, 8, MUTED)
        for high, low in ((193, 167), (125, 99)):
            canvas.arrow((middle - 8, high), (middle - 8, low))
            canvas.arrow((middle + 8, low), (middle + 8, high), **back)
        for i, name in enumerate(names):
            canvas.box(left + 4 + (width - 2) * i, 70, width - 8 + 2 * (len(names) > 1), 28, name, colors)
    canvas.box(20, 126, 68, 40, "cos, sin\nof a token", size=8.5)
    canvas.arrow((89, 146), (111, 146))
    canvas.box(112, 126, 362, 40, "rotated\ncosines and sines stay in registers for all heads", size=8.5)
    canvas.box(482, 126, 66, 40, "copied", size=8.5)
    canvas.box(556, 126, 76, 40, "sigmoid", size=8.5)
    canvas.text(20, 84, "tensors", 8.5, ha="left", weight="bold")
    of_all = "coloured rows: what one program works on; a layer without keys of its own has no key and value in a row"
    canvas.text(20, 22, of_all, 8.5, MUTED, ha="left")
    of_forward = "every number of $y$ is read", "once and written once;", "then $y$ can be freed"
    of_backward = (
        "the same way with gradients,",
        "rotated by the opposite angle;",
        "a gate's times $g$ (1 − $g$);",
        "only the gates are kept",
    )
    for y, title, lines, style in ((290, "forward", of_forward, {}), (190, "backward", of_backward, back)):
        canvas.arrow((658, y), (684, y), **style)
        caption(canvas, 692, y, title, lines, style.get("color", INK))
    return canvas


def cross_entropy() -> Canvas:
    """Two passes over the logits, with one exchange between."""
    canvas = canvas_of(300, "Cross-entropy: the vocabulary split over ranks, two passes over the logits")
    for x, title, words, color in [
        (126, "logits", "of a token", FULL[0]),
        (289, "forward", "reads them", BLOCKS[0]),
        (463, "exchange", "over ranks", BLOCKS[0]),
        (641, "backward", "reads them again", SHARED[0]),
        (806, "gradient", "where the logits were", SHARED[0]),
    ]:
        canvas.text(x, 250, title, 9.5, color, weight="bold")
        canvas.text(x, 234, words, 8.5, MUTED)
    for rank, (y, line) in enumerate(((152, 212), (84, 64))):  # the line: how logits reach the backward pass
        canvas.text(20, y + 20, f"rank {rank}", 9, ha="left", weight="bold")
        for j in range(6):
            canvas.cell(72 + 18 * j, y + 8, 18, *FULL, 3, height=24)
            canvas.cell(752 + 18 * j, y + 8, 18, *SHARED, 3, height=24)
        canvas.box(214, y - 2, 150, 44, "maximum, sum\nthe label's logit", BLOCKS, size=8.5)
        canvas.box(562, y - 2, 158, 44, "exp(logit − log-sum)\n− 1 at the label", SHARED, size=8.5)
        for start, stop in ((182, 213), (365, 391), (535, 561), (721, 750)):
            canvas.arrow((start, y + 20), (stop, y + 20))
        leaves, arrives = (y + 7, y - 3) if rank else (y + 33, y + 43)
        canvas.arrow((126, leaves), (126, line), (641, line), (641, arrives), color=FULL[0])
    canvas.box(392, 82, 142, 112, colors=BLOCKS)
    for y, words, weight in [
        (174, "one maximum", "bold"),
        (150, "one sum", "bold"),
        (134, "of exponentials,", "normal"),
        (118, "of the label's logit", "normal"),
        (99, "log-sum, FP32", "bold"),
    ]:
        canvas.text(463, y, words, 8.5, weight=weight)
    for y, words in [
        (42, "loss: log-sum − the label's logit; what comes back for it multiplies the gradient"),
        (24, "kept for the backward pass: the logits themselves, the labels and the log-sum, but no softmax"),
    ]:
        canvas.text(20, y, words, 8.5, MUTED, ha="left")
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
    "rotary": rotary,
    "cross_entropy": cross_entropy,
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
