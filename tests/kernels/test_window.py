"""The window kernels in Triton's interpreter against the reference operator and its automatic gradients."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kernels import reference
from kernels.errors import KernelError
from kernels.window import window_backward, window_forward, window_key_gradients
from tests.kernels.test_reference import document_starts

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted in FP32; tests/gpu runs them compiled")

FP32 = dict(rtol=1e-5, atol=1e-5)  # sums of up to 200 terms of size 1, in another order
PACKED = [(61, 1, 18), (80,)]  # lengths of the documents in each of two sequences


def inputs(*, group: int = 2, K: int = 2, D: int = 32, DV: int = 32, documents=PACKED, seed: int = 0) -> list[Tensor]:
    """q, k, v, sink, document_start, grad_output."""
    start = document_starts(documents)
    B, S = start.shape
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, S, group * K, D), (B, S, K, D), (B, S, K, DV), (group * K,), (B, S, group * K, DV)
    q, k, v, sink, grad_output = (torch.randn(*shape, generator=generator) for shape in shapes)
    return [q, k, v, sink, start, grad_output]


def expected(q, k, v, sink, start, grad_output, window: int) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v, sink) if x is not None]
    output = reference.window_attention(*leaves[:3], start, window, leaves[3] if sink is not None else None)
    return output.detach(), list(torch.autograd.grad(output, leaves, grad_output))


CASES = {
    "groups of 2": dict(),
    "groups of 16": dict(group=16, K=1),
    "no groups": dict(group=1),
    "a group that fills a tile": dict(group=64, K=1, D=16, DV=16, documents=[(25,)]),
    "a group larger than a tile": dict(group=128, K=1, documents=[(9,)]),
    "values narrower than keys, no powers of two": dict(D=48, DV=16),
    "one token": dict(documents=[(1,)]),
    "documents of one token": dict(documents=[(1,) * 5]),
}


@pytest.mark.parametrize("window", [5, 128])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_reference(case, window):
    q, k, v, sink, start, grad_output = x = inputs(**CASES[case])
    output, gradients = expected(*x, window)
    found, lse = window_forward(q, k, v, sink, start, window=window)
    assert_close(found, output, **FP32)
    assert_close(list(window_backward(q, k, v, sink, start, found, lse, grad_output, window=window)), gradients, **FP32)


def test_without_a_sink_there_is_no_gradient_of_one():
    q, k, v, _, start, grad_output = inputs()
    output, gradients = expected(q, k, v, None, start, grad_output, 7)
    found, lse = window_forward(q, k, v, None, start, window=7)
    assert_close(found, output, **FP32)
    *found, dsink = window_backward(q, k, v, None, start, found, lse, grad_output, window=7)
    assert dsink is None
    assert_close(found, gradients, **FP32)


def test_chunks_of_queries_give_what_the_whole_sequence_gives():
    """Context parallelism: a rank holds some queries and all keys; the ranks' dk, dv and dsink are summed."""
    q, k, v, sink, start, grad_output = x = inputs()
    output, gradients = expected(*x, 20)
    outputs, dq, others = [], [], []
    for first, stop in ((0, 33), (33, 80)):
        rows = q[:, first:stop], k, v, sink, start[:, first:stop]
        found, lse = window_forward(*rows, window=20, query_start=first)
        outputs.append(found)
        mine, *rest = window_backward(*rows, found, lse, grad_output[:, first:stop], window=20, query_start=first)
        dq.append(mine)
        others.append(rest)
    assert_close(torch.cat(outputs, 1), output, **FP32)
    assert_close([torch.cat(dq, 1), *(a + b for a, b in zip(*others, strict=True))], gradients, **FP32)


def test_a_gate_on_the_output_reaches_keys_and_values():
    """delta leaves the gate out, and gate and statistics may have any strides."""
    q, k, v, sink, start, grad_output = inputs(group=4, K=1)
    B, S, H, _ = q.shape
    gate = torch.rand(B, H, S).transpose(1, 2)
    output, gradients = expected(q, k, v, sink, start, grad_output * gate[..., None], 9)
    _, lse = window_forward(q, k, v, sink, start, window=9)
    delta = (grad_output * output).sum(-1).transpose(1, 2)
    found = window_key_gradients(q, k, v, start, lse, delta, grad_output, gate, window=9, out_dtype=torch.float32)
    assert_close(list(found), gradients[1:3], **FP32)


def test_inputs_may_be_slices_of_one_projection():
    q, k, v, sink, start, grad_output = x = inputs()
    output, gradients = expected(*x, 30)
    q, k, v = torch.cat([q, k, v], dim=2).split([q.shape[2], k.shape[2], v.shape[2]], dim=2)
    grad_output = grad_output.transpose(1, 2).contiguous().transpose(1, 2)
    sink = torch.stack([sink, sink + 1], dim=1)[:, 0]
    found, lse = window_forward(q, k, v, sink, start, window=30)
    assert_close(found, output, **FP32)
    assert_close(list(window_backward(q, k, v, sink, start, found, lse, grad_output, window=30)), gradients, **FP32)


WRONG = {  # what the message names, the inputs, the options
    "window is 0": (dict(), dict(window=0)),
    "query_start 1 and 80 queries": (dict(), dict(query_start=1)),
    "query_start -1": (dict(), dict(query_start=-1)),
    "q has 3 heads": (dict(group=3), dict()),
    "q and v have head dimensions 32 and 20": (dict(DV=20), dict()),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_is_named(message):
    shapes, options = WRONG[message]
    q, k, v, sink, start, grad_output = inputs(**shapes)
    B, S, H, _ = q.shape
    options, rows = {"window": 4} | options, torch.zeros(B, H, S)
    with pytest.raises(KernelError, match=message):
        window_forward(q, k, v, sink, start, **options)
    with pytest.raises(KernelError, match=message):
        window_backward(q, k, v, sink, start, grad_output, rows, grad_output, **options)
    with pytest.raises(KernelError, match=message):
        window_key_gradients(q, k, v, start, rows, rows, grad_output, None, **options)


@pytest.mark.parametrize(
    "name, change",
    [("output", lambda x: x[:, 1:]), ("grad_output", lambda x: x.double()), ("lse", lambda x: x.transpose(1, 2))],
)
def test_what_is_not_of_the_forward_pass_is_named(name, change):
    q, k, v, sink, start, grad_output = inputs()
    output, lse = window_forward(q, k, v, sink, start, window=4)
    results = {"output": output, "lse": lse, "grad_output": grad_output}
    window_backward(q, k, v, sink, start, **results, window=4)
    with pytest.raises(KernelError, match=f"^{name} is torch"):
        window_backward(q, k, v, sink, start, **results | {name: change(results[name])}, window=4)
