"""The figures of docs/kernels.md that follow one selection: index build, and both directions of a sparse layer.

`docs/kernel_figures.py` writes them.
"""

from docs.figures import BLOCKS, FULL, INK, MUTED, OWN, SHARED, SPARSE, WHITE, Canvas, canvas_of

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
