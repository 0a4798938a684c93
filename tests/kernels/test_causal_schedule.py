"""Programs that wait for each other: in Triton's interpreter against a count over all queries and keys."""

import random

import pytest
import torch
import triton
import triton.language as tl

from kernels.causal_backward import query_ends
from kernels.causal_schedule import heads_together, place, walk

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted; tests/gpu runs the kernel that waits")

KEYS, ROWS = 128, 64  # of the kernel's tiles


@triton.jit
def _schedule(out, ends, B, K, S, tiles, together, query_start, KEYS: tl.constexpr, TOKENS: tl.constexpr):
    head, batch, tile = place(tl.program_id(0), B, K, tiles, together)
    begin, whole, whole_end, end = walk(ends + (batch * tiles + tile) * 2, tile, S, query_start, KEYS, TOKENS)
    out += tl.program_id(0) * 7
    tl.store(out, head)
    tl.store(out + 1, batch)
    tl.store(out + 2, tile)
    tl.store(out + 3, begin)
    tl.store(out + 4, whole)
    tl.store(out + 5, whole_end)
    tl.store(out + 6, end)


def schedule(start: torch.Tensor, K: int, T: int, query_start: int, tokens: int, together: int) -> list[list[int]]:
    """What each program does, in the order in which they start."""
    (B, S), tiles = start.shape, triton.cdiv(T, KEYS)
    out = torch.zeros(B * K * tiles, 7, dtype=torch.int32)
    ends = query_ends(start, T, KEYS)
    _schedule[(len(out),)](out, ends, B, K, S, tiles, together, query_start, KEYS=KEYS, TOKENS=tokens)
    return out.tolist()


def random_case(seed: int) -> tuple[torch.Tensor, int, int, int]:
    """document_start of some queries of packed documents, KV heads, keys, and where the queries begin."""
    draw = random.Random(seed)
    B, K, T = draw.choice([1, 2]), draw.choice([1, 2, 3]), draw.randint(1, 900)
    S = draw.randint(1, T)
    query_start, longest, starts = draw.randint(0, T - S), draw.choice([1, 60, 400, 2000]), []
    for _ in range(B):
        row = []
        while len(row) < T:
            row += [len(row)] * draw.randint(1, longest)
        starts.append(row[query_start : query_start + S])
    return torch.tensor(starts, dtype=torch.int32), K, T, query_start


@pytest.mark.parametrize("seed", range(12))
def test_a_program_waits_only_for_earlier_ones_and_for_all_that_come_to_its_rows(seed):
    start, K, T, query_start = random_case(seed)
    S, tokens = start.shape[1], ROWS // [1, 4, 16, 64][seed % 4]
    programs = schedule(start, K, T, query_start, tokens, together=1 + seed % 4)
    assert len({tuple(program[:3]) for program in programs}) == len(programs) == start.shape[0] * K * -(-T // KEYS)
    been = {}  # (sequence, head, tile of rows) -> tiles of keys that have been there
    for head, batch, tile, begin, _, _, end in programs:
        for m in range(begin, end):
            before = tile - int(start[batch, m * tokens]) // KEYS  # what the kernel counts
            assert been.setdefault((batch, head, m), []) == list(range(tile - before, tile))
            been[batch, head, m].append(tile)
    assert len(been) == start.shape[0] * K * -(-S // tokens)


@pytest.mark.parametrize("seed", range(12))
def test_every_visible_key_is_met_and_whole_tiles_need_no_mask(seed):
    start, K, T, query_start = random_case(seed)
    S, tokens = start.shape[1], ROWS // [1, 4, 16, 64][seed % 4]
    key, position = torch.arange(T), query_start + torch.arange(S)
    visible = (key <= position[:, None]) & (key >= start[:, :, None])  # [B, S, T]
    met = torch.zeros_like(visible)
    for _, batch, tile, begin, whole, whole_end, end in schedule(start, K, T, query_start, tokens, together=2):
        keys = slice(tile * KEYS, tile * KEYS + KEYS)
        met[batch, begin * tokens : end * tokens, keys] = True
        assert visible[batch, whole * tokens : whole_end * tokens, keys].all()
    assert (visible <= met).all()


def test_heads_take_turns_where_one_has_too_few_programs_or_documents_are_packed():
    undivided, packed = torch.zeros(2, 5, dtype=torch.int32), torch.tensor([[0] * 5, [0, 0, 2, 3, 3]])
    tiles = [triton.cdiv(T, KEYS) for T in (128, 8192, 32768, 131072)]
    assert [heads_together(undivided, 8, number).item() for number in tiles] == [8, 4, 1, 1]
    assert [heads_together(packed, 8, number).item() for number in tiles] == [8, 8, 8, 8]
