"""Our backward kernels of causal attention in Triton's interpreter against automatic differentiation of the formula."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kernels.causal_backward import causal_backward, query_ends
from kernels.errors import KernelError
from tests.kernels.test_reference import document_starts

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted in FP32; tests/gpu runs them compiled")

FP32 = dict(rtol=1e-5, atol=2e-5)  # sums of up to 300 terms of size 1 to 10, in another order
PACKED = [(3, 70, 1, 66), (100, 40)]  # documents in two sequences, with edges in and between the tiles


def attention(q, k, v, start, sink=None, query_start: int = 0) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, written down without tiles."""
    B, S, H, D = q.shape
    group = H // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    position, key = torch.arange(query_start, query_start + S)[:, None], torch.arange(k.shape[1])
    visible = (key <= position) & (key >= start[:, None, :, None])  # [B, 1, S, T]
    logits = (torch.einsum("bshd,bthd->bhst", q, k) * D**-0.5).masked_fill(~visible, -torch.inf)
    lse = logits.logsumexp(-1)
    if sink is not None:
        lse = torch.logaddexp(lse, sink[:, None])
    return torch.einsum("bhst,bthd->bshd", (logits - lse[..., None]).exp(), v), lse


def inputs(*, group: int = 2, K: int = 1, D: int = 32, DV: int = 32, documents=PACKED) -> list[Tensor]:
    """q, k, v, document_start, grad_output."""
    start = document_starts(documents)
    B, S = start.shape
    generator = torch.Generator().manual_seed(0)
    shapes = (B, S, group * K, D), (B, S, K, D), (B, S, K, DV), (B, S, group * K, DV)
    q, k, v, grad_output = (torch.randn(*shape, generator=generator) for shape in shapes)
    return [q, k, v, start, grad_output]


def expected(q, k, v, start, grad_output, sink=None) -> tuple[Tensor, Tensor, list[Tensor]]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v, sink) if x is not None]
    output, lse = attention(*leaves[:3], start, *leaves[3:])
    return output.detach(), lse.detach(), list(torch.autograd.grad(output, leaves, grad_output))


CASES = {
    "groups of 2": dict(),
    "groups of 16": dict(group=16, documents=[(40, 30)]),
    "no groups": dict(group=1, K=2),
    "two KV heads": dict(K=2, documents=[(90,)]),
    "values narrower than keys, no powers of two": dict(D=48, DV=16),
    "one token": dict(documents=[(1,)]),
    "documents of one token": dict(documents=[(1,) * 5]),
    "a document that fills the tiles": dict(documents=[(128, 64)]),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_formula(case):
    q, k, v, start, grad_output = x = inputs(**CASES[case])
    output, lse, gradients = expected(*x)
    *found, dsink = causal_backward(q, k, v, output, lse, grad_output, start)
    assert dsink is None
    assert_close(found, gradients, **FP32)


def test_a_sink_gets_its_gradient():
    q, k, v, start, grad_output = x = inputs(group=4)
    sink = torch.tensor([0.5, -1.0, 3.0, 0.0])
    output, lse, gradients = expected(*x, sink)
    assert_close(list(causal_backward(q, k, v, output, lse, grad_output, start, sink=sink)), gradients, **FP32)


@pytest.mark.parametrize("documents", [PACKED, [(140,)]])
def test_chunks_of_queries_give_what_the_whole_sequence_gives(documents):
    """Context parallelism: a rank holds some queries and all keys; the ranks' dk and dv are summed."""
    q, k, v, start, grad_output = x = inputs(documents=documents)
    output, lse, gradients = expected(*x)
    dq, dk, dv = [], 0, 0
    for first, stop in ((0, 75), (75, 140)):
        chunk = slice(first, stop)
        mine = q[:, chunk], k, v, output[:, chunk], lse[:, :, chunk], grad_output[:, chunk]
        found = causal_backward(*mine, start[:, chunk], query_start=first)
        dq.append(found[0])
        dk, dv = dk + found[1], dv + found[2]
    assert_close([torch.cat(dq, 1), dk, dv], gradients, **FP32)


def test_gradients_from_elsewhere_are_added_before_rounding():
    """In FP16 a sum of two rounded numbers would be off by more than the one rounding that is allowed."""
    q, k, v, start, grad_output = (x.half() if x.is_floating_point() else x for x in inputs(documents=[(70,)]))
    output, lse = attention(q.float(), k.float(), v.float(), start)
    output = output.half()
    dk_add, dv_add = (100 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in (k, v))
    _, dk, dv, _ = causal_backward(q, k, v, output, lse, grad_output, start, dk_add=dk_add, dv_add=dv_add)
    exact = expected(*(x.float() for x in (q, k, v)), start, grad_output.float())[2]
    for found, own, added in ((dk, exact[1], dk_add), (dv, exact[2], dv_add)):
        assert found.dtype == torch.float16
        assert_close(found.float(), own + added, rtol=2**-11, atol=0.02)  # own gradients: FP16 products of size 1


def test_inputs_may_be_slices_of_one_projection():
    q, k, v, start, grad_output = x = inputs()
    output, lse, gradients = expected(*x)
    q, k, v = torch.cat([q, k, v], dim=2).split([q.shape[2], k.shape[2], v.shape[2]], dim=2)
    grad_output = grad_output.transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(list(causal_backward(q, k, v, output, lse, grad_output, start)[:3]), gradients, **FP32)


def test_query_ends_are_those_of_a_count():
    start = document_starts(PACKED)
    found = query_ends(start, 140, 64)
    for b in range(2):
        for tile, first in enumerate(range(0, 140, 64)):
            last = min(first + 63, 139)
            assert found[b, 2 * tile] == sum(s <= first for s in start[b].tolist())
            assert found[b, 2 * tile + 1] == sum(s <= last for s in start[b].tolist())


ONE_DOCUMENT = torch.zeros(1, 10, dtype=torch.int32)
WRONG = {  # what the message names: shapes, document_start and query_start
    "query_start 1 and 10 queries": (dict(), ONE_DOCUMENT, 1),
    "query_start -1": (dict(), ONE_DOCUMENT, -1),
    "q has 3 heads": (dict(group=3), ONE_DOCUMENT, 0),
    "q and v have head dimensions 20 and 32": (dict(D=20), ONE_DOCUMENT, 0),
    "document_start is torch.int64": (dict(), torch.zeros(1, 10, dtype=torch.int64), 0),
    r"document_start is torch.int32 \[1, 9\]": (dict(), torch.zeros(1, 9, dtype=torch.int32), 0),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_is_named(message):
    shapes, start, query_start = WRONG[message]
    q, k, v, _, grad_output = inputs(documents=[(10,)], **shapes)
    lse = torch.zeros(1, q.shape[2], 10)
    with pytest.raises(KernelError, match=message):
        causal_backward(q, k, v, grad_output, lse, grad_output, start, query_start=query_start)


@pytest.mark.parametrize(
    "name, change",
    [
        ("grad_output", lambda x: x[:, 1:]),
        ("lse", lambda x: x.double()),
        ("dk_add", lambda x: x[:, 1:]),
        ("dv_add", lambda x: x.half()),
    ],
)
def test_gradients_and_results_that_do_not_fit_are_named(name, change):
    q, k, v, _, grad_output = inputs(documents=[(10,)])
    lse = torch.zeros(1, q.shape[2], 10)
    given = {"grad_output": grad_output, "lse": lse, "dk_add": torch.zeros(k.shape), "dv_add": torch.zeros(v.shape)}
    causal_backward(q, k, v, grad_output, document_start=ONE_DOCUMENT, **given)
    with pytest.raises(KernelError, match=f"^{name} is torch"):
        causal_backward(q, k, v, grad_output, document_start=ONE_DOCUMENT, **given | {name: change(given[name])})
