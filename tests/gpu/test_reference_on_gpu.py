"""The reference operators on a GPU against themselves on the CPU, whose truth is in tests/kernels."""

import pytest
import torch
from torch.testing import assert_close

from kernels import reference
from tests.kernels.test_reference import BLOCK, OPERATORS, SELECTED, example, with_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# FP32: sums of 37 terms of size 1 to 10, in another order. BF16: the same sums, rounded once, so at most to neighbours.
TOLERANCES = {torch.float32: dict(rtol=1e-5, atol=1e-5), torch.bfloat16: dict(rtol=2**-7, atol=1e-5)}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", OPERATORS)
def test_outputs_and_gradients_are_those_of_the_cpu(name, dtype, monkeypatch):
    monkeypatch.setattr(reference, "QUERY_CHUNK", 16)
    x = example().to(dtype=dtype)
    found = with_gradients(name, x.to(device="cuda"))
    assert {(y.device.type, y.dtype) for y in found.values()} == {("cuda", dtype)}
    assert_close(found, with_gradients(name, x), **TOLERANCES[dtype], check_device=False)


def test_selected_blocks_are_those_of_the_cpu():
    on_cpu, on_gpu = (
        reference.scored_attention(x.q, x.k, x.v, x.document_start, BLOCK, SELECTED)[1]
        for x in (example(), example().to(device="cuda"))
    )
    assert on_gpu.is_cuda and on_gpu.dtype == torch.int32
    assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=0)


def test_equal_scores_go_to_the_lower_block():
    """Stable sorting is another algorithm on a GPU, and yet another for long rows."""
    q, k = (torch.zeros(1, 4096, 1, 8, device="cuda") for _ in range(2))
    start = torch.zeros(1, 4096, dtype=torch.int32, device="cuda")
    blocks = reference.scored_attention(q, k, k, start, 1, 40)[1]
    assert blocks[0, 0, -1].tolist() == list(range(40))
    assert blocks[0, 0, 7].tolist() == [*range(8), *[-1] * 32]
