"""The two kernels of a sparse layer that go by key block, for Hopper and the shapes of the paper (Gluon).

They compute what `_choice_outputs_kernel` of `sparse_forward.py` and `_choice_gradients_kernel` of `sparse_backward.py`
do, which take every other case. The difference is when the rows of the next step are fetched: the copies into a second
buffer start before the products of the step at hand, and arrive while those run. Triton's own pipeline starts them
behind the products, because their addresses come out of the list of entries.

A buffer whose rows have been used then takes the results of its step, to the threads that write whole rows of them.
`disable_licm`: the addresses that would be kept in registers instead do not fit there.
"""

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from kernels.arguments import INTERPRETED
from kernels.selection import masked_until, piece_of

ROWS = gl.constexpr(64)  # of a step: entries times heads
BLOCK = gl.constexpr(64)  # keys
D = gl.constexpr(128)
_BY_TOKEN = gl.BlockedLayout([1, 1, 8], [1, 2, 16], [4, 1, 1], [2, 1, 0])
GATHER = gl.constexpr(_BY_TOKEN)  # [tokens, heads, D]
PER_TOKEN = gl.constexpr(gl.SliceLayout(1, gl.SliceLayout(2, _BY_TOKEN)))
SINGLE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))  # [ROWS]
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
TILE_OF_HEADS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3))
VECTOR = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


def supported(block: int, q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> bool:
    """Whether these kernels take the case on this device. All tensors [B, S, heads, D]; the others as q is."""
    return (
        not INTERPRETED
        and torch.cuda.get_device_capability(q.device) == (9, 0)
        and q.shape[3] == v.shape[3] == D.value
        and block == BLOCK.value
        and ROWS.value % (q.shape[2] // k.shape[2]) == 0
        and not any(stride % 16 for x in (q, k, v, *others) for stride in x.stride()[:3])  # what Triton calls aligned
    )


@gluon.jit
def _entries(Entries, first, stop, row, PER: gl.constexpr):
    """The entries of a step that begins at `first`, PER rows each: 0 behind the last one; and whether there is one."""
    at = first + row // PER
    return gl.load(Entries + at, mask=at < stop, other=0), at < stop


@gluon.jit
def _fetch(tile, Source, token, inside, stride_s, stride_h):
    """Starts copying tokens of [S, heads, D] to shared memory [tokens, heads, D]; zeros where not inside."""
    head = gl.arange(0, tile.shape[1], gl.SliceLayout(0, gl.SliceLayout(2, GATHER)))
    column = gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, GATHER)))
    tokens = Source + token.to(gl.int64) * stride_s
    pointers = tokens[:, None, None] + head[None, :, None] * stride_h + column[None, None, :]
    async_copy.async_copy_global_to_shared(tile, pointers, mask=inside[:, None, None])


@gluon.jit
def _fetch_block(tile, Source, block, T, stride_s):
    key = block * BLOCK + gl.arange(0, BLOCK, PER_TOKEN)
    _fetch(tile, Source, key, key < T, stride_s, 0)


@gluon.jit
def _step_entries(Entries, first, stop, slot, row, G: gl.constexpr):
    """The entries of a step of the gradient kernel: one for each token, one for each row."""
    entry, inside = _entries(Entries, first, stop, slot, 1)
    return entry, inside, _entries(Entries, first, stop, row, G)[0], row % G


@gluon.jit
def _fetch_step(tiles, at, sources, entries, H: gl.constexpr, SELECTED: gl.constexpr):
    """Starts copying what a step of the gradient kernel reads of its rows, to the `at`-th of each pair of buffers."""
    q_tiles, grad_tiles, lse_rows, delta_rows = tiles
    Q, q_s, q_h, Grad, do_s, do_h, LSE, Delta = sources
    entry, inside, row_entry, head = entries
    _fetch(q_tiles.index(at), Q, entry // SELECTED, inside, q_s, q_h)
    _fetch(grad_tiles.index(at), Grad, entry // SELECTED, inside, do_s, do_h)
    row = (row_entry // SELECTED).to(gl.int64) * H + head
    async_copy.async_copy_global_to_shared(lse_rows.index(at), LSE + row)
    async_copy.async_copy_global_to_shared(delta_rows.index(at), Delta + row)


@gluon.jit
def _arrived():
    """All copies of this thread are there, and those of the others; matrix products may read them."""
    async_copy.wait_group(0)
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _write_rows(tile, values, Out, entry, inside):
    """The heads of a step's entries [ROWS, D] to where their choices keep them, through a tile of shared memory."""
    G: gl.constexpr = tile.shape[1]
    tile.reshape([ROWS, D]).store(values.to(tile.dtype))
    head = gl.arange(0, G, gl.SliceLayout(0, gl.SliceLayout(2, GATHER)))
    column = gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, GATHER)))
    to = Out + entry.to(gl.int64) * (G * D)
    to = to[:, None, None] + head[None, :, None] * D + column[None, None, :]
    # The next kernel comes too late to find any of it in the L2 cache.
    gl.store(to, tile.load(GATHER), mask=inside[:, None, None], eviction_policy="evict_first")


@gluon.jit(do_not_specialize=["first_head"])
def hopper_choice_outputs_kernel(
    Q, Keys, Values, DocumentStart, Entries, Bounds, FirstPiece, Pieces, cells, key_blocks, Parts, PartLSE,
    first_head, S, T, query_start, scale, q_b, q_s, k_b, k_s, k_h, v_b, v_s, v_h, q_h: gl.constexpr,
    K: gl.constexpr, G: gl.constexpr, SELECTED: gl.constexpr, PIECE: gl.constexpr,
):  # fmt: skip
    """A piece of the queries of one chunk that chose one block: the attention of each to this block alone."""
    part, kv_row = gl.program_id(1).to(gl.int64), first_head + gl.program_id(1)
    block, first, stop = piece_of(Bounds, FirstPiece, Pieces, kv_row, cells, key_blocks, PIECE)
    if first == stop:
        return
    b, kv_head = (kv_row // K).to(gl.int64), kv_row % K
    Q += b * q_b + kv_head * G * q_h
    DocumentStart += b * S
    Entries += kv_row.to(gl.int64) * S * SELECTED
    Parts += part * S * SELECTED * G * D
    PartLSE += part * S * SELECTED * G
    TOKENS: gl.constexpr = ROWS // G
    PER_ROW: gl.constexpr = gl.SliceLayout(1, SCORES)

    keys = gl.allocate_shared_memory(Q.dtype.element_ty, [BLOCK, 1, D], TILE_OF_HEADS)
    values = gl.allocate_shared_memory(Q.dtype.element_ty, [BLOCK, 1, D], TILE_OF_HEADS)
    tiles = gl.allocate_shared_memory(Q.dtype.element_ty, [2, TOKENS, G, D], TILE_OF_HEADS)
    slot = gl.arange(0, TOKENS, PER_TOKEN)
    entry, inside = _entries(Entries, first, stop, slot, 1)
    _fetch(tiles.index(0), Q, entry // SELECTED, inside, q_s, q_h)
    _fetch_block(keys, Keys + b * k_b + kv_head * k_h, block, T, k_s)
    _fetch_block(values, Values + b * v_b + kv_head * v_h, block, T, v_s)
    async_copy.commit_group()
    next_entry, next_inside = _entries(Entries, first + TOKENS, stop, slot, 1)
    keys, values = keys.reshape([BLOCK, D]), values.reshape([BLOCK, D])
    masked = masked_until(DocumentStart, Entries, first, stop, block, query_start, SELECTED, BLOCK)
    key = block * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, SCORES))
    row = gl.arange(0, ROWS, PER_ROW)
    row_entry, row_inside = _entries(Entries, first, stop, row, G)
    at = 0
    for i in tl.range(first, stop, TOKENS, disable_licm=True):
        _arrived()
        tile = tiles.index(at)
        at ^= 1
        _fetch(tiles.index(at), Q, next_entry // SELECTED, next_inside, q_s, q_h)
        async_copy.commit_group()
        later_entry, later_inside = _entries(Entries, i + 2 * TOKENS, stop, slot, 1)
        later_row, later_row_inside = _entries(Entries, i + TOKENS, stop, row, G)

        nothing = gl.zeros([ROWS, BLOCK], gl.float32, SCORES)
        scores = warpgroup_mma(tile.reshape([ROWS, D]), keys.permute((1, 0)), nothing, use_acc=False)
        if i < masked:
            token = row_entry // SELECTED
            start = gl.load(DocumentStart + token)
            visible = (key[None, :] <= query_start + token[:, None]) & (key[None, :] >= start[:, None])
            scores = gl.where(visible, scores, -float("inf"))
        top = gl.maximum(gl.max(scores, 1) * scale, -1e30)  # no NaN where nothing is visible
        p = gl.exp2(scores * scale - top[:, None])
        total = gl.sum(p, 1)
        gl.store(PartLSE + row_entry.to(gl.int64) * G + row % G, top + gl.log2(total), mask=row_inside)
        p = gl.convert_layout(p.to(tile.dtype), gl.DotOperandLayout(0, SUMS, 2))
        output = warpgroup_mma(p, values, gl.zeros([ROWS, D], gl.float32, SUMS), use_acc=False)
        share = gl.convert_layout(1 / gl.maximum(total, 1e-30), gl.SliceLayout(1, SUMS), assert_trivial=True)
        _write_rows(tile, output * share[:, None], Parts, entry, inside)
        entry, inside = next_entry, next_inside
        next_entry, next_inside = later_entry, later_inside
        row_entry, row_inside = later_row, later_row_inside
    async_copy.wait_group(0)


@gluon.jit(do_not_specialize=["first_head"])
def hopper_choice_gradients_kernel(
    Q, Keys, Values, Grad, LSE, Delta, DocumentStart, Entries, Bounds, FirstPiece, Pieces, cells, key_blocks,
    DQParts, DKParts, DVParts,
    first_head, S, T, query_start, scale, q_b, q_s, k_b, k_s, k_h, v_b, v_s, v_h, do_b, do_s,
    q_h: gl.constexpr, do_h: gl.constexpr, K: gl.constexpr, G: gl.constexpr, SELECTED: gl.constexpr,
    PIECE: gl.constexpr,
):  # fmt: skip
    """What a piece of the queries of one chunk that chose one block send to its keys and values, and get from them."""
    part, kv_row = gl.program_id(1).to(gl.int64), first_head + gl.program_id(1)
    block, first, stop = piece_of(Bounds, FirstPiece, Pieces, kv_row, cells, key_blocks, PIECE)
    if first == stop:
        return
    b, kv_head = (kv_row // K).to(gl.int64), kv_row % K
    Q += b * q_b + kv_head * G * q_h
    Grad += b * do_b + kv_head * G * do_h
    LSE += b * S * (K * G) + kv_head * G
    Delta += b * S * (K * G) + kv_head * G
    DocumentStart += b * S
    Entries += kv_row.to(gl.int64) * S * SELECTED
    DQParts += part * S * SELECTED * G * D
    TOKENS: gl.constexpr = ROWS // G
    PER_ROW: gl.constexpr = gl.SliceLayout(0, SCORES)

    keys = gl.allocate_shared_memory(Q.dtype.element_ty, [BLOCK, 1, D], TILE_OF_HEADS)
    values = gl.allocate_shared_memory(Q.dtype.element_ty, [BLOCK, 1, D], TILE_OF_HEADS)
    q_tiles = gl.allocate_shared_memory(Q.dtype.element_ty, [2, TOKENS, G, D], TILE_OF_HEADS)
    grad_tiles = gl.allocate_shared_memory(Q.dtype.element_ty, [2, TOKENS, G, D], TILE_OF_HEADS)
    ds_tile = gl.allocate_shared_memory(Q.dtype.element_ty, [BLOCK, ROWS], TILE)
    lse_rows = gl.allocate_shared_memory(gl.float32, [2, ROWS], VECTOR)
    delta_rows = gl.allocate_shared_memory(gl.float32, [2, ROWS], VECTOR)
    slot = gl.arange(0, TOKENS, PER_TOKEN)
    single_row = gl.arange(0, ROWS, SINGLE)
    sources = (Q, q_s, q_h, Grad, do_s, do_h, LSE, Delta)
    tiles = (q_tiles, grad_tiles, lse_rows, delta_rows)
    entries = _step_entries(Entries, first, stop, slot, single_row, G)
    _fetch_step(tiles, 0, sources, entries, K * G, SELECTED)
    _fetch_block(keys, Keys + b * k_b + kv_head * k_h, block, T, k_s)
    _fetch_block(values, Values + b * v_b + kv_head * v_h, block, T, v_s)
    async_copy.commit_group()
    entries = _step_entries(Entries, first + TOKENS, stop, slot, single_row, G)
    keys, values = keys.reshape([BLOCK, D]), values.reshape([BLOCK, D])
    masked = masked_until(DocumentStart, Entries, first, stop, block, query_start, SELECTED, BLOCK)
    key = block * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, SCORES))
    row = gl.arange(0, ROWS, PER_ROW)
    dk = gl.zeros([BLOCK, D], gl.float32, SUMS)
    dv = gl.zeros([BLOCK, D], gl.float32, SUMS)
    at = 0
    for i in tl.range(first, stop, TOKENS, disable_licm=True):
        _arrived()
        q, grad, lse, delta = q_tiles.index(at), grad_tiles.index(at), lse_rows.index(at), delta_rows.index(at)
        nothing = gl.zeros([BLOCK, ROWS], gl.float32, SCORES)
        q_rows, grad_rows = q.reshape([ROWS, D]), grad.reshape([ROWS, D])
        scores = warpgroup_mma(keys, q_rows.permute((1, 0)), nothing, use_acc=False, is_async=True)
        dp = warpgroup_mma(values, grad_rows.permute((1, 0)), nothing, use_acc=False, is_async=True)
        at ^= 1
        _fetch_step(tiles, at, sources, entries, K * G, SELECTED)
        async_copy.commit_group()
        entries = _step_entries(Entries, i + 2 * TOKENS, stop, slot, single_row, G)

        scores = warpgroup_mma_wait(1, deps=(scores,))
        # Behind the last entry q and grad are zero: there any finite p and delta will do, and p is at most 1 elsewhere.
        p = gl.exp2(gl.minimum(scores * scale - lse.load(PER_ROW)[None, :], 0.0))  # gate x probability, [keys, rows]
        if i < masked:
            chosen_by = _entries(Entries, i, stop, row, G)[0] // SELECTED
            start = gl.load(DocumentStart + chosen_by)
            visible = (key[:, None] <= query_start + chosen_by[None, :]) & (key[:, None] >= start[None, :])
            p = gl.where(visible, p, 0.0)
        weights = gl.convert_layout(p.to(q.dtype), gl.DotOperandLayout(0, SUMS, 2))
        dv = warpgroup_mma(weights, grad_rows, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp,))
        ds = (p * (dp - delta.load(PER_ROW)[None, :])).to(q.dtype)
        ds_tile.store(ds)
        fence_async_shared()
        gl.thread_barrier()
        dq = gl.zeros([ROWS, D], gl.float32, SUMS)
        dq = warpgroup_mma(ds_tile.permute((1, 0)), keys, dq, use_acc=False, is_async=True)
        dk = warpgroup_mma(gl.convert_layout(ds, gl.DotOperandLayout(0, SUMS, 2)), q_rows, dk, is_async=True)
        dq, dv = warpgroup_mma_wait(1, deps=(dq, dv))
        entry, inside = _entries(Entries, i, stop, slot, 1)
        gl.thread_barrier()  # all warps are through with grad: its buffer takes dq
        _write_rows(grad, dq, DQParts, entry, inside)
        dk = warpgroup_mma_wait(0, deps=(dk,))
    async_copy.wait_group(0)
    line = (part * gl.num_programs(0) + gl.program_id(0)) * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, SUMS))
    column = gl.arange(0, D, gl.SliceLayout(0, SUMS))
    gl.store(DKParts + line[:, None] * D + column[None, :], dk)
    gl.store(DVParts + line[:, None] * D + column[None, :], dv)
