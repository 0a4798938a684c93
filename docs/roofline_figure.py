"""Draws the roofline picture of docs/performance.md.

    python -m docs.roofline_figure [FILE]

It comes from docs/performance.json, which `python -m kernels.bench --json docs/performance.json` writes.
"""

import json
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from docs.figures import BLOCKS, FULL, GREY, INK, MUTED, OWN, PAPER, SHARED, SPARSE, STYLE, WIDTH

DOCS = Path(__file__).parent
MEASURED = DOCS / "performance.json"
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
    ridge, points, rates, labels = peak / bandwidth, [], [], {}
    for row in measured["rows"]:
        color = next((c for words, c in OPERATOR_COLORS.items() if row["operator"].startswith(words)), None)
        both = "forward + backward" in row["operator"]
        if color is None or both or not (row["ms"] and row["flops"] and row["bytes"]) or row["indices"] in UNTYPICAL:
            continue
        intensity, rate = row["flops"] / row["bytes"], row["flops"] / row["ms"] / 1e9
        points.append(intensity)
        rates.append(rate)
        label = next(words for words in OPERATOR_COLORS if row["operator"].startswith(words))
        size = {8192: 26, 32768: 52}.get(row["length"], 84)
        axes.scatter(intensity, rate, size, color, marker=MARKERS[row["shape"]], ec=PAPER, lw=0.7, zorder=3)
        labels.setdefault(label, axes.scatter([], [], 52, color))
    low, high = min([*points, ridge]) / 2, max([*points, ridge]) * 2
    line = [low, ridge, high]
    axes.plot(line, [min(peak, x * bandwidth) / 1e12 for x in line], color=INK, lw=1.5)
    axes.text(high / 1.1, peak / 1e12 * 1.07, f"{peak / 1e12:.0f} TFLOP/s, 8192³ BF16 product", ha="right", size=9)
    axes.text(ridge / 1.8, ridge / 2 * bandwidth / 1e12, f"{bandwidth / 1e12:.1f} TB/s, copy", size=9)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(min([*rates, peak / 2e12]) / 1.5, peak / 1e12 * 1.5))
    for axis, labelled in ((axes.xaxis, (1, 3)), (axes.yaxis, (1, 2, 5))):
        axis.set_major_locator(LogLocator(subs=labelled))
        axis.set_major_formatter("{x:,g}")
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("useful FLOPs per byte that has to move")
    axes.set_ylabel("useful TFLOP/s")
    axes.grid(color=GREY[1], which="both", zorder=0)
    shapes = [axes.scatter([], [], 40, MUTED, marker=marker, label=name) for name, marker in MARKERS.items()]
    lengths = [axes.scatter([], [], size, MUTED, label=name) for name, size in (("8K", 26), ("32K", 52), ("128K", 84))]
    beside = {"frameon": False, "fontsize": 9}
    axes.add_artist(axes.legend(handles=[*shapes, *lengths], loc="lower left", bbox_to_anchor=(1, 0), **beside))
    axes.legend(labels.values(), labels.keys(), loc="upper left", bbox_to_anchor=(1, 1), **beside)
    axes.set_title(f"Kernels on one {measured['about']['GPU']}", loc="left", size=11, weight="bold")
    return figure


def main(file: Path) -> None:
    with matplotlib.rc_context(STYLE):
        roofline(json.loads(MEASURED.read_text())).savefig(file, dpi=200)
    print(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "roofline.png")
