"""Decoding as operators: what `kernels.decode` gives, whole graphs, and what torch asks of an operator."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kernels import decode, decode_operators
from kernels.decode import KVCache
from tests.kernels.test_decode import DEVICE, LENGTHS, WINDOW, K, sequences


def step(version, q: Tensor, cache: KVCache, ring: KVCache, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """A full layer, and a sparse layer that reads the blocks it selects."""
    output, blocks = version.decode_full(q, cache, lengths, block=16, selected=3)
    return output, version.decode_sparse(output, cache, blocks, ring, lengths, block=16, window=WINDOW)


@pytest.mark.parametrize("layout", ["contiguous", "paged"])
def test_torch_compile_takes_a_step_in_one_graph(layout):
    x = sequences(2, 32)
    arguments = x.last, getattr(x, layout)(), x.ring(WINDOW), x.lengths
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_close(compiled(decode_operators, *arguments), step(decode, *arguments), rtol=0, atol=0)


def test_a_branch_may_be_absent():
    x = sequences(2, 32)
    arguments = x.last, None, None, x.ring(WINDOW), x.lengths
    found, expected = (
        version.decode_sparse(*arguments, block=16, window=WINDOW) for version in (decode_operators, decode)
    )
    assert_close(found, expected, rtol=0, atol=0)


def test_registrations_hold_what_torch_asks_of_an_operator():
    """Schema and meta shapes against real calls."""
    x = sequences(2, 32)
    k, v, table = x.paged()
    ring, gate = x.ring(WINDOW), torch.rand(len(LENGTHS), 2 * K, device=DEVICE)
    _, blocks = decode.decode_full(x.last, x.paged(), x.lengths, block=64, selected=3)
    tests = "test_schema", "test_faketensor"
    full = x.last, k, v, table, x.lengths, None, 64, 3
    torch.library.opcheck(torch.ops.hysparse.decode_full.default, full, test_utils=tests)
    sparse = x.last, k, v, table, blocks, *ring, x.lengths, None, None, gate, None, 64, WINDOW
    torch.library.opcheck(torch.ops.hysparse.decode_sparse.default, sparse, test_utils=tests)
