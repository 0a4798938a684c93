"""Decoding through Triton's interpreter against the last row of the reference operators over the whole sequence.

Every slot of a cache that holds no token is NaN, and lengths are no multiples of anything.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kernels import operators, reference
from kernels.decode import decode_full, decode_sparse
from kernels.errors import KernelError
from kernels.shared import PAGE, KVCache

LENGTHS = (333, 1, 64, 130)
CAPACITY = 400  # no multiple of the tile
WINDOW = 24
K = 2
FP32 = dict(rtol=1e-5, atol=1e-5)  # sums of 333 terms of size 1 in another order, and FP32's 6e-8; measured: 1e-6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if torch.cuda.is_available() else torch.float32
TOLERANCE = FP32 if DTYPE == torch.float32 else dict(rtol=2e-3, atol=2e-3)  # FP16's 5e-4, of outputs and of weights


@dataclass
class Sequences:
    """Whole sequences of one attention layer; only the last query of each is decoded."""

    q: list[Tensor]  # [1, length, H, D] each
    k: list[Tensor]  # [1, length, K, D]
    v: list[Tensor]  # [1, length, K, Dv]

    @property
    def last(self) -> Tensor:
        return torch.cat([q[:, -1] for q in self.q])

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([q.shape[1] for q in self.q], dtype=torch.int32, device=DEVICE)

    def each(self):
        for q, k, v in zip(self.q, self.k, self.v, strict=True):
            yield q, k, v, torch.zeros(1, q.shape[1], dtype=torch.int32, device=DEVICE)

    def contiguous(self) -> KVCache:
        return KVCache(*(_padded(xs, lambda t: t, CAPACITY) for xs in (self.k, self.v)))

    def ring(self, window: int) -> KVCache:
        return KVCache(*(_padded(xs, lambda t: t % window, window) for xs in (self.k, self.v)))

    def paged(self) -> KVCache:
        """Pages in an order of their own; entries of the table that no token needs point nowhere."""
        pages = [-(-q.shape[1] // PAGE) for q in self.q]
        free = torch.randperm(sum(pages) + 3, generator=torch.Generator().manual_seed(1)).tolist()
        table = torch.full((len(pages), max(pages) + 1), 1 << 30, dtype=torch.int32)
        caches = [torch.full((len(free), PAGE, *xs[0].shape[2:]), torch.nan) for xs in (self.k, self.v)]
        for b, count in enumerate(pages):
            for i in range(count):
                table[b, i] = page = free.pop()
                for cache, xs in zip(caches, (self.k, self.v), strict=True):
                    tokens = xs[b][0, i * PAGE : (i + 1) * PAGE]
                    cache[page, : len(tokens)] = tokens
        return KVCache(*(cache.to(DEVICE, DTYPE) for cache in caches), table.to(DEVICE))


def sequences(group: int, D: int, Dv: int | None = None, lengths=LENGTHS, seed: int = 0) -> Sequences:
    generator = torch.Generator().manual_seed(seed)

    def normal(heads: int, width: int) -> list[Tensor]:
        return [torch.randn(1, n, heads, width, generator=generator).to(DEVICE, DTYPE) for n in lengths]

    return Sequences(normal(group * K, D), normal(K, D), normal(K, Dv or D))


def _padded(xs: list[Tensor], slot, size: int) -> Tensor:
    cache = torch.full((len(xs), size, *xs[0].shape[2:]), torch.nan, device=DEVICE, dtype=DTYPE)
    for row, x in zip(cache, xs, strict=True):
        for token in range(x.shape[1]):
            row[slot(token)] = x[0, token]
    return cache


def _vectors(H: int, Dv: int, elementwise: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two sinks [H] and two gates [B, H] or [B, H, Dv]."""
    generator = torch.Generator().manual_seed(2)
    sinks = torch.randn(2, H, generator=generator).to(DEVICE)
    shape = (2, len(LENGTHS), H, Dv) if elementwise else (2, len(LENGTHS), H)
    gates = torch.rand(shape, generator=generator).to(DEVICE, DTYPE)
    return *sinks, *gates


def _last(outputs) -> Tensor:
    return torch.cat([output[:, -1] for output in outputs])


@pytest.mark.parametrize("version", [operators, reference], ids=["triton", "reference"])
@pytest.mark.parametrize("layout", ["contiguous", "paged"])
@pytest.mark.parametrize(
    ("group", "D", "Dv", "block", "selected"),
    [(2, 32, 32, 16, 5), (16, 16, 16, 64, 3), (4, 32, 32, 32, 20), (1, 32, 16, 128, 2), (3, 48, 32, 64, 1)],
)
def test_full_layer_equals_the_last_row_of_scored_attention(group, D, Dv, block, selected, layout, version):
    x = sequences(group, D, Dv)
    cache = getattr(x, layout)()
    found, found_blocks = version.decode_full(x.last, cache, x.lengths, block=block, selected=selected)
    expected = [reference.scored_attention(*each, block, selected) for each in x.each()]
    assert_close(found, _last(output for output, _ in expected), **TOLERANCE)
    assert_close(found_blocks, torch.cat([blocks[:, :, -1] for _, blocks in expected]), rtol=0, atol=0)


@pytest.mark.parametrize("version", [operators, reference], ids=["triton", "reference"])
@pytest.mark.parametrize("elementwise", [False, True], ids=["headwise", "elementwise"])
@pytest.mark.parametrize("layout", ["contiguous", "paged"])
@pytest.mark.parametrize(
    ("group", "D", "Dv", "block", "selected"), [(2, 32, 32, 16, 5), (16, 16, 16, 64, 3), (4, 48, 32, 128, 2)]
)
def test_sparse_layer_equals_the_last_row_of_both_branches(group, D, Dv, block, selected, layout, elementwise, version):
    x, own = sequences(group, D, Dv), sequences(group, D, Dv, seed=1)
    own.q = x.q
    sparse_sink, window_sink, sparse_gate, window_gate = _vectors(group * K, Dv, elementwise)
    blocks = [reference.scored_attention(*each, block, selected)[1] for each in x.each()]
    sparse = _last(
        reference.sparse_attention(q, k, v, chosen, start, block, sparse_sink)
        for (q, k, v, start), chosen in zip(x.each(), blocks, strict=True)
    )
    near = _last(reference.window_attention(*each, WINDOW, window_sink) for each in own.each())
    last_blocks = torch.cat([chosen[:, :, -1] for chosen in blocks])
    gates = [gate if elementwise else gate[..., None] for gate in (sparse_gate, window_gate)]

    def decode(sparse_branch: bool, window_branch: bool, **options: Tensor) -> Tensor:
        return version.decode_sparse(
            x.last,
            getattr(x, layout)() if sparse_branch else None,
            last_blocks if sparse_branch else None,
            own.ring(WINDOW) if window_branch else None,
            x.lengths,
            block=block,
            window=WINDOW,
            sparse_sink=sparse_sink,
            window_sink=window_sink,
            **options,
        )

    both = decode(True, True, sparse_gate=sparse_gate, window_gate=window_gate)
    assert_close(both, sparse * gates[0] + near * gates[1], **TOLERANCE)
    assert_close(decode(True, False, sparse_gate=sparse_gate), sparse * gates[0], **TOLERANCE)
    assert_close(decode(False, True), near, **TOLERANCE)


@pytest.mark.parametrize("version", [operators, reference], ids=["triton", "reference"])
def test_sink_of_the_full_layer_takes_its_share_and_moves_the_ranking(version):
    x = sequences(2, 32)
    sink = torch.randn(2 * K, generator=torch.Generator().manual_seed(3)).to(DEVICE) * 3
    found, blocks = version.decode_full(x.last, x.contiguous(), x.lengths, block=16, selected=4, sink=sink)
    for b, (q, k, v, start) in enumerate(x.each()):
        everything = torch.zeros(1, K, q.shape[1], -(-q.shape[1] // 16), dtype=torch.int32, device=DEVICE)
        everything[:] = torch.arange(everything.shape[-1], device=DEVICE)
        expected = reference.sparse_attention(q, k, v, everything, start, 16, sink)[0, -1]
        assert_close(found[b], expected, **TOLERANCE)
        logits = torch.einsum("kgd,tkd->kgt", q[0, -1].double().view(K, 2, -1), k[0].double()) / 32**0.5
        lse = torch.cat([logits, sink.double().view(K, 2, 1)], -1).logsumexp(-1, keepdim=True)
        score = (logits - lse).amax(1)
        score = torch.stack([part.amax(-1) for part in score.split(16, dim=-1)], -1)
        best = score.topk(min(4, score.shape[-1])).indices.int()
        assert_close(blocks[b, :, : best.shape[-1]], best, rtol=0, atol=0)
        assert (blocks[b, :, best.shape[-1] :] == -1).all()


@pytest.mark.parametrize("selected", [0, 7, 40])
def test_equal_scores_go_to_the_lower_block(selected):
    """Identical keys: every full block has the same score, in each of the parts the sequence is read in."""
    x = sequences(2, 32, lengths=(333,))
    x.k[0][:] = x.k[0][:, :1].clone()
    _, blocks = decode_full(x.last, x.contiguous(), x.lengths, block=16, selected=selected)
    assert blocks.tolist() == [[[j if j < 21 else -1 for j in range(selected)]] * K]


def test_selection_goes_through_more_blocks_than_it_holds_at_a_time(monkeypatch):
    monkeypatch.setattr("kernels.decode.RANKED", 4)
    x = sequences(2, 32)
    _, blocks = decode_full(x.last, x.contiguous(), x.lengths, block=16, selected=6)
    expected = [reference.scored_attention(*each, 16, 6)[1][:, :, -1] for each in x.each()]
    assert_close(blocks, torch.cat(expected), rtol=0, atol=0)


def test_an_empty_block_list_gives_zero():
    x = sequences(2, 32)
    nothing = torch.full((len(LENGTHS), K, 3), -1, dtype=torch.int32, device=DEVICE)
    output = decode_sparse(x.last, x.contiguous(), nothing, None, x.lengths, block=16, window=0)
    assert_close(output, torch.zeros_like(output), rtol=0, atol=0)


def test_caches_and_gates_may_be_views():
    x = sequences(2, 32)
    cache, ring = x.contiguous(), x.ring(WINDOW)
    q = x.last.transpose(0, 1).contiguous().transpose(0, 1)
    both = torch.stack([cache.k, cache.v], dim=3)
    view = KVCache(both[:, :, :, 0], both[:, :, :, 1])
    sink, lengths = torch.randn(2 * K, 2, device=DEVICE)[:, 0], torch.stack([x.lengths, x.lengths - 1], dim=1)[:, 0]
    plain, plain_blocks = decode_full(x.last, cache, x.lengths, block=16, selected=3, sink=sink.contiguous())
    output, blocks = decode_full(q, view, lengths, block=16, selected=3, sink=sink)
    assert_close((output, blocks), (plain, plain_blocks), rtol=0, atol=0)
    pages = x.paged()
    pages = pages._replace(page_table=pages.page_table.t().contiguous().t())
    assert_close(decode_full(q, pages, lengths, block=16, selected=3, sink=sink)[0], plain, rtol=0, atol=0)
    gate = torch.rand(2 * K, len(LENGTHS), device=DEVICE)
    found = [
        decode_sparse(*arguments, ring, x.lengths, block=16, window=WINDOW, sparse_gate=gate)
        for arguments, gate in [((q, view, blocks), gate.T), ((x.last, cache, blocks), gate.T.contiguous())]
    ]
    assert_close(found[0], found[1], rtol=0, atol=0)


def step(q: Tensor, cache: KVCache, ring: KVCache, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """A full layer, and a sparse layer that reads the blocks it selects."""
    output, blocks = decode_full(q, cache, lengths, block=16, selected=3)
    return output, decode_sparse(output, cache, blocks, ring, lengths, block=16, window=WINDOW)


@pytest.mark.parametrize("layout", ["contiguous", "paged"])
def test_torch_compile_takes_a_step_in_one_graph(layout):
    x = sequences(2, 32)
    arguments = x.last, getattr(x, layout)(), x.ring(WINDOW), x.lengths
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
    assert_close(found, step(*arguments), rtol=0, atol=0)


def test_registrations_hold_what_torch_asks_of_an_operator():
    """Schema and meta shapes against real calls."""
    x = sequences(2, 32)
    k, v, table = x.paged()
    ring, gate = x.ring(WINDOW), torch.rand(len(LENGTHS), 2 * K, device=DEVICE)
    _, blocks = decode_full(x.last, x.paged(), x.lengths, block=64, selected=3)
    tests = "test_schema", "test_faketensor"
    full = x.last, k, v, table, x.lengths, None, 64, 3
    torch.library.opcheck(torch.ops.hysparse.decode_full.default, full, test_utils=tests)
    sparse = x.last, k, v, table, blocks, *ring, x.lengths, None, None, gate, None, 64, WINDOW
    torch.library.opcheck(torch.ops.hysparse.decode_sparse.default, sparse, test_utils=tests)
    window = x.last, None, None, None, None, *ring, x.lengths, None, None, None, gate, 64, WINDOW
    torch.library.opcheck(torch.ops.hysparse.decode_sparse.default, window, test_utils=tests)


FULL = {  # what the message names: a change to the arguments of a call that works
    "block=48": lambda x, a: a | {"block": 48},
    "lengths is torch.int64": lambda x, a: a | {"lengths": x.lengths.long()},
    r"lengths is torch.int32 \[3\]": lambda x, a: a | {"lengths": x.lengths[:3]},
    "q has 3 heads": lambda x, a: a | {"q": x.last[:, :3]},
    r"q has shape \[4, 32\]; .* \[B, H, D\]": lambda x, a: a | {"q": x.last[:, 0]},
    r"q has shape \[0, 4, 32\]": lambda x, a: a | {"q": x.last[:0]},
    "selected=-1": lambda x, a: a | {"selected": -1},
    "q has head dimension 16, cache.k 32": lambda x, a: a | {"q": x.last[..., :16]},
    "cache.k .* and cache.v": lambda x, a: a | {"cache": KVCache(a["cache"].k, a["cache"].v[:, :-1])},
    "cache.v .* as many pages of v": lambda x, a: a | {"cache": x.paged()._replace(v=x.paged().v[:-1])},
    r"page_table is torch.int32 \[4, 0\]": lambda x, a: (
        a | {"cache": x.paged()._replace(page_table=x.paged().page_table[:, :0])}
    ),
    r"cache.k has shape \[0, 64": lambda x, a: a | {"cache": x.paged()._replace(k=x.paged().k[:0], v=x.paged().v[:0])},
    "cache.k .* int32 page_table": lambda x, a: a | {"cache": a["cache"]._replace(page_table=x.paged().page_table)},
    "page_table is torch.int64": lambda x, a: a | {"cache": x.paged()._replace(page_table=x.paged().page_table.long())},
    r"page_table is torch.int32 \[3": lambda x, a: (
        a | {"cache": x.paged()._replace(page_table=x.paged().page_table[:3])}
    ),
}
SPARSE = {
    "cache and window_cache are both None": lambda x, a: a | {"cache": None, "window_cache": None},
    "blocks is None": lambda x, a: a | {"blocks": None},
    "blocks is torch.int64": lambda x, a: a | {"blocks": a["blocks"].long()},
    r"blocks is torch.int32 \[4, 1, 3\]": lambda x, a: a | {"blocks": a["blocks"][:, :1]},
    r"blocks is torch.int32 \[4, 2\]": lambda x, a: a | {"blocks": a["blocks"][..., 0]},
    r"blocks is torch.int32 \[4, 2, 3, 1\]": lambda x, a: a | {"blocks": a["blocks"][..., None]},
    "ring buffer of window=25": lambda x, a: a | {"window": 25},
    "no pages": lambda x, a: a | {"window_cache": x.paged(), "window": PAGE},
    "cache.v has 2 KV heads, window_cache.v 1": lambda x, a: (
        a | {"window_cache": KVCache(*(y[:, :, :1] for y in a["window_cache"][:2]))}
    ),
    "cache.v has head dimension 32, window_cache.v 16": lambda x, a: (
        a | {"window_cache": KVCache(a["window_cache"].k, a["window_cache"].v[..., :16])}
    ),
    "sparse_gate has shape": lambda x, a: a | {"sparse_gate": a["sparse_gate"][:1]},
    "window_gate has shape": lambda x, a: a | {"window_gate": a["sparse_gate"][..., None]},
}


def full_arguments(x: Sequences) -> dict:
    return {"q": x.last, "cache": x.contiguous(), "lengths": x.lengths, "block": 64, "selected": 3}


def sparse_arguments(x: Sequences) -> dict:
    branches = {"cache": x.contiguous(), "window_cache": x.ring(WINDOW), "block": 64, "window": WINDOW}
    blocks = torch.zeros(len(LENGTHS), K, 3, dtype=torch.int32, device=DEVICE)
    gate = torch.ones(len(LENGTHS), 2 * K, device=DEVICE)
    return {"q": x.last, "lengths": x.lengths, "blocks": blocks, "sparse_gate": gate, **branches}


@pytest.mark.parametrize("message", FULL)
def test_a_wrong_argument_of_the_full_layer_is_named(message):
    x = sequences(2, 32)
    with pytest.raises(KernelError, match=message):
        decode_full(**FULL[message](x, full_arguments(x)))


@pytest.mark.parametrize("message", SPARSE)
def test_a_wrong_argument_of_the_sparse_layer_is_named(message):
    x = sequences(2, 32)
    with pytest.raises(KernelError, match=message):
        decode_sparse(**SPARSE[message](x, sparse_arguments(x)))


@pytest.mark.parametrize("length", [0, 401])
def test_a_length_that_the_cache_cannot_hold_is_named_when_debugging(length, monkeypatch):
    x = sequences(2, 32)
    arguments = full_arguments(x)
    monkeypatch.setenv("HYSPARSE_DEBUG", "1")
    decode_full(**arguments)
    arguments["lengths"][2] = length
    with pytest.raises(KernelError, match=rf"lengths\[2\] is {length}; .* 1 token at least, and 400 at most"):
        decode_full(**arguments)


def test_a_sequence_without_a_token_is_named_for_a_ring_buffer_too(monkeypatch):
    x = sequences(2, 32)
    arguments = sparse_arguments(x) | {"cache": None, "blocks": None, "sparse_gate": None}
    monkeypatch.setenv("HYSPARSE_DEBUG", "1")
    decode_sparse(**arguments)
    arguments["lengths"][1] = 0
    with pytest.raises(KernelError, match=r"lengths\[1\] is 0; a sequence has 1 token at least"):
        decode_sparse(**arguments)


@pytest.mark.parametrize("page", [-1, 12])
def test_a_page_that_does_not_exist_is_named_when_debugging(page, monkeypatch):
    x = sequences(2, 32)
    arguments = sparse_arguments(x) | {"cache": x.paged(), "blocks": None}
    monkeypatch.setenv("HYSPARSE_DEBUG", "1")
    _, arguments["blocks"] = decode_full(x.last, x.paged(), x.lengths, block=64, selected=3)
    decode_sparse(**arguments)  # entries that no token needs may hold anything
    pages = len(arguments["cache"].k)
    arguments["cache"].page_table[3, 2] = page if page < 0 else pages
    with pytest.raises(KernelError, match=rf"page_table\[3, 2\] is .*; it must be one of the {pages} pages"):
        decode_sparse(**arguments)


def test_a_block_that_the_cache_cannot_hold_is_named_when_debugging(monkeypatch):
    x = sequences(2, 32)
    arguments = sparse_arguments(x)
    arguments["blocks"][:] = torch.arange(3)
    arguments["blocks"][2, 1, 0] = 7  # 400 slots are blocks 0 to 6
    decode_sparse(**arguments)  # reads nothing there
    monkeypatch.setenv("HYSPARSE_DEBUG", "1")
    with pytest.raises(KernelError, match=r"blocks\[2, 1, 0\] is 7; it must be -1 or one of the 7 key blocks"):
        decode_sparse(**arguments)
