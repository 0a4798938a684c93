"""Decoding one token per sequence over 131,072 cached ones: which share of the memory's speed the two layers reach.

    python -m kernels.bench_decode

GB/s counts the K and V that have to be read: all of them for the full layer, the selected blocks and the window for the
sparse one. It is held against a copy of 4 GiB, read and written, in the same run. A sparse layer has one CTA for a KV
head of a sequence; where those are fewer than the GPU has multiprocessors, latency is all there is to see. Calls are
replayed from a CUDA graph, as generation does, because launching takes longer than the shorter ones run. A graph holds
several calls on different inputs, which together are many times the size of the L2 cache.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.testing import do_bench

from kernels.bench_inputs import BLOCK, DIMENSION, SELECTED, SHAPES, WINDOW
from kernels.decode import decode_full, decode_sparse
from kernels.roofline import measure_ceilings
from kernels.shared import PAGE, KVCache

LENGTH = 131_072
TOUCHED = 1 << 30  # bytes that the calls of a graph read at least; the L2 cache holds 50 or 60 MB
CALLS = 64  # of a graph at most
POOL = 65_536  # pages that paged sequences share: few enough to fit, so many that hardly a block is read twice


def rows(bandwidth: float) -> list[dict]:
    """Operator, shape, milliseconds, gigabytes_per_second, fraction_of_copy, peer and note of everything.

    `bandwidth`, in bytes per second, is what the copy reaches.
    """
    found, copied = [], bandwidth / 1e9
    for shape in SHAPES:
        for measure in (_full, _sparse):
            for row in measure(shape, copied):
                found.append(row)
                torch.cuda.empty_cache()
    return found


def _full(shape: str, copied: float) -> Iterator[dict]:
    H, K = SHAPES[shape]
    for B, paged in ((1, False), (1, True), (2, False), (4, False), (8, False), (8, True)):
        read = 2 * B * LENGTH * K * DIMENSION * 2
        lengths = torch.full((B,), LENGTH, device="cuda", dtype=torch.int32)
        inputs = [(_random(B, H, DIMENSION), _cache(B, K, paged)) for _ in range(max(2, -(-TOUCHED // read)))]
        options = {"lengths": lengths, "block": BLOCK, "selected": SELECTED}
        ours = _milliseconds([partial(decode_full, q, cache, **options) for q, cache in inputs])
        peer = "" if paged else f"SDPA without scores {_milliseconds([_sdpa(*x) for x in inputs]):.3f} ms"
        yield _row("decode, full layer", _name(shape, B, paged), ours, read, copied, peer)
        del inputs


def _sparse(shape: str, copied: float) -> Iterator[dict]:
    H, K = SHAPES[shape]
    sinks = torch.randn(2, H, device="cuda")
    for B, paged in ((1, False), (1, True), (16, True), (64, False), (64, True), (256, True)):
        read = 2 * B * (SELECTED * BLOCK + WINDOW) * K * DIMENSION * 2
        lengths = torch.full((B,), LENGTH, device="cuda", dtype=torch.int32)
        cache = _cache(B, K, paged, pool=POOL)

        def call(B=B, cache=cache, lengths=lengths) -> Callable[[], Tensor]:
            q, gates = _random(B, H, DIMENSION), torch.rand(2, B, H, device="cuda").bfloat16()
            blocks = torch.rand(B, K, LENGTH // BLOCK, device="cuda").topk(SELECTED).indices.int()
            ring = KVCache(*(_random(B, WINDOW, K, DIMENSION) for _ in range(2)))
            options = {"block": BLOCK, "window": WINDOW, "sparse_sink": sinks[0], "window_sink": sinks[1]}
            options |= {"sparse_gate": gates[0], "window_gate": gates[1]}
            return partial(decode_sparse, q, cache, blocks, ring, lengths, **options)

        ours = _milliseconds([call() for _ in range(min(CALLS, max(2, -(-TOUCHED // read))))])
        processors = torch.cuda.get_device_properties("cuda").multi_processor_count
        note = f"latency: {B * K} CTAs on {processors} multiprocessors" if B * K < processors else ""
        yield _row("decode, sparse layer", _name(shape, B, paged), ours, read, copied, note=note)
        del cache, call


def _row(operator: str, shape: str, ms: float, moved: int, copied: float, peer: str = "", note: str = "") -> dict:
    speed = moved / ms / 1e6
    return {
        "operator": operator,
        "shape": shape,
        "milliseconds": ms,
        "gigabytes_per_second": speed,
        "fraction_of_copy": speed / copied,
        "peer": peer,
        "note": note,
    }


def _name(shape: str, B: int, paged: bool) -> str:
    return f"{shape}, {LENGTH:,} keys, batch {B}{', pages' if paged else ''}"


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _cache(B: int, K: int, paged: bool, pool: int | None = None) -> KVCache:
    """LENGTH tokens of each sequence; paged ones in random pages, of their own unless a smaller `pool` is given."""
    if not paged:
        return KVCache(*(_random(B, LENGTH, K, DIMENSION) for _ in range(2)))
    needed = B * LENGTH // PAGE
    pages = min(needed, pool or needed)
    table = torch.randperm(needed, device="cuda").int().view(B, -1) % pages
    return KVCache(*(_random(pages, PAGE, K, DIMENSION) for _ in range(2)), table)


def _sdpa(q: Tensor, cache: KVCache) -> Callable[[], Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q[:, None], cache.k, cache.v))
    return partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=True)


def _milliseconds(calls: list[Callable[[], object]]) -> float:
    """Time of one of the calls, all in one graph."""
    calls[0]()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return do_bench(graph.replay, warmup=10, rep=60, return_mode="median") / len(calls)


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, BF16, medians")
    for row in rows(measure_ceilings().bandwidth):
        print(
            f"{row['operator']:22}{row['shape']:38}{row['milliseconds']:>9.4f} ms"
            f"{row['gigabytes_per_second']:>8,.0f} GB/s{row['fraction_of_copy']:>7.0%}  {row['peer']}{row['note']}"
        )


if __name__ == "__main__":
    main()
