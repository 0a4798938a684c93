"""The mixture-of-experts kernels against their plain versions, and the plain versions against a loop over experts."""

import pytest
import torch
from torch.testing import assert_close

from kernels import KernelError, moe, moe_reference, overlap

BOTH = pytest.mark.parametrize("operators", [moe_reference, moe], ids=["reference", "triton"])
# FP32 sums in another order
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def logits_of(S: int, B: int, E: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(S, B, E, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("S, B, E, active", [(70, 2, 12, 3), (33, 1, 64, 8), (5, 3, 4, 1), (1, 1, 512, 8)])
@pytest.mark.parametrize("chunk", [8, 32])
def test_the_kernel_routes_and_sends_gradients_as_the_plain_version(S, B, E, active, biased, score, chunk, monkeypatch):
    monkeypatch.setattr("kernels.routing.CHUNKS", (chunk,))
    bias = torch.randn(E, generator=torch.Generator().manual_seed(1)) * 0.3 if biased else None
    results = []
    for operators in (moe_reference, moe):
        logits = logits_of(S, B, E).requires_grad_()
        routing = operators.route(logits, bias, active, score, balance=True)
        generator = torch.Generator().manual_seed(2)
        loss = (routing.weights * torch.randn(S * B, active, generator=generator)).sum()
        loss = loss + (routing.score_sums * torch.randn(B, E, generator=generator)).sum()
        loss.backward()
        results.append((routing, logits.grad))
    (plain, plain_grad), (ours, grad) = results
    for name in ("experts", "offsets", "choices"):
        assert torch.equal(getattr(ours, name), getattr(plain, name)), name
    assert ours.choices.dtype == plain.choices.dtype == torch.float32
    for name in ("weights", "score_sums"):
        assert_close(getattr(ours, name), getattr(plain, name), **TOLERANCE)
    assert_close(grad, plain_grad, **TOLERANCE)


@BOTH
@pytest.mark.parametrize("S, B, E, active", [(70, 2, 12, 3), (40, 1, 64, 8)])
def test_positions_number_the_rows_and_group_them_by_expert(operators, S, B, E, active):
    routing = operators.route(logits_of(S, B, E), None, active, "sigmoid", balance=False)
    assert torch.equal(routing.position.flatten().sort().values, torch.arange(S * B * active))
    expert_of_row = torch.empty(S * B * active, dtype=torch.int32)
    expert_of_row[routing.position.flatten()] = routing.experts.flatten()
    assert torch.equal(expert_of_row, expert_of_row.sort().values)
    assert torch.equal(routing.counts, torch.bincount(expert_of_row, minlength=E).int())


@BOTH
def test_equal_scores_go_to_the_lower_experts(operators):
    routing = operators.route(torch.zeros(3, 1, 6), None, 2, "sigmoid", balance=False)
    assert routing.experts.tolist() == [[0, 1]] * 3 and routing.counts.tolist() == [3, 3, 0, 0, 0, 0]


def test_a_token_of_nan_logits_stays_inside_the_arrays():
    logits = logits_of(10, 1, 8)
    logits[4] = float("nan")
    routing = moe.route(logits, None, 2, "sigmoid", balance=True)
    assert routing.experts.max() < 8 and 0 <= routing.position.min() and routing.position.max() < 20


@BOTH
def test_grouped_routing_stays_in_the_groups_with_the_largest_sums(operators):
    logits = torch.tensor([5.0, -9, -9, 4, 3, 3, -9, -9]).view(1, 1, 8)  # groups of two: sums -4, -5, 6, -18
    assert operators.route(logits, None, 2, "softmax", balance=False).experts.tolist() == [[0, 3]]
    assert operators.route(logits, None, 2, "softmax", balance=False, groups=(4, 1)).experts.tolist() == [[4, 5]]


@BOTH
def test_rows_of_experts_are_added_up_and_weights_go_to_rows_and_their_gradients_back(operators):
    routing = operators.route(logits_of(40, 1, 6), None, 2, "sigmoid", balance=False)
    load, tokens = torch.arange(6), torch.arange(6).float()
    operators.tally(routing, load, tokens)
    operators.tally(routing, load)
    assert torch.equal(load, torch.arange(6) + 2 * routing.counts)
    assert torch.equal(tokens, torch.arange(6) + routing.counts.float())
    weights = routing.weights.detach().requires_grad_()
    _, rows = operators.spread(torch.zeros(40, 3), weights, routing.position)
    assert torch.equal(rows[routing.position], weights)
    rows.backward(torch.arange(80.0))
    assert torch.equal(weights.grad, routing.position.float())


@BOTH
@pytest.mark.parametrize("capacity", [1, 4, 100])
def test_dropped_rows_leave_no_gap_and_get_no_gradient(operators, capacity, monkeypatch):
    monkeypatch.setattr("kernels.expert_rows.WIDEST", 4)  # two programs a token, of which one moves the weights
    S, E, active, hidden = 20, 6, 3, 5
    full = operators.route(logits_of(S, 1, E), None, active, "sigmoid", balance=False)
    routing = operators.within_capacity(full, capacity)
    assert torch.equal(routing.counts, full.counts.clamp(max=capacity)) and routing.kept == routing.counts.sum()
    for e in range(E):  # the first tokens of each expert stay, in their order
        stay = routing.position[full.experts == e]
        start = int(routing.offsets[e] - routing.counts[e])
        assert stay.tolist() == [*range(start, int(routing.offsets[e])), *[-1] * (len(stay) - int(routing.counts[e]))]

    x = torch.randn(S, hidden, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weights = routing.weights.detach().requires_grad_()
    rows, row_weights = operators.spread(x, weights, routing.position, routing.kept)
    y = operators.combine(rows * row_weights[:, None], routing.position)
    stays = (routing.position >= 0).float()
    expected = (weights * stays).sum(1, keepdim=True) * x
    assert_close(y, expected, **TOLERANCE)
    grad = torch.randn(S, hidden, generator=torch.Generator().manual_seed(2))
    ours, theirs = (torch.autograd.grad(z, (x, weights), grad, retain_graph=True) for z in (y, expected))
    for mine, exact in zip(ours, theirs, strict=True):
        assert_close(mine, exact, **TOLERANCE)


def loop_over_experts(x, fc1, fc2, experts, weights):
    """The definition: each token's chosen experts, one after the other."""
    y = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for e, weight in zip(experts[t].tolist(), weights[t], strict=True):
            gate, up = (fc1[e] @ x[t]).chunk(2)
            y[t] = y[t] + weight * (fc2[e] @ (torch.nn.functional.silu(gate) * up))
    return y


@BOTH
@pytest.mark.parametrize("to", ["spread", "one expert", "half of them empty"])
def test_the_experts_equal_a_loop_over_tokens_in_value_and_all_gradients(operators, to):
    S, E, active, hidden, ffn = 11, 6, 2, 24, 8
    generator = torch.Generator().manual_seed(3)
    x, fc1, fc2 = (
        torch.randn(*shape, generator=generator) for shape in ((S, hidden), (E, 2 * ffn, hidden), (E, hidden, ffn))
    )
    logits = logits_of(S, 1, E)
    if to == "one expert":
        logits[..., 2] += 100
        active = 1
    elif to == "half of them empty":
        logits[..., 1::2] -= 100
    grad = torch.randn(S, hidden, generator=generator)

    def run(forward):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, fc1, fc2)]
        routing = operators.route(logits.clone().requires_grad_(), None, active, "softmax", balance=False)
        weights = routing.weights.detach().requires_grad_()
        y = forward(*leaves, routing, weights)
        y.backward(grad)
        return [y.detach(), weights.grad, *(leaf.grad for leaf in leaves)]

    def grouped(x, fc1, fc2, routing, weights):
        rows, weights = operators.spread(x, weights, routing.position)
        rows = operators.grouped_linear(rows, fc1, routing.offsets)
        rows = operators.weighted_swiglu(rows, weights)
        return operators.combine(operators.grouped_linear(rows, fc2, routing.offsets), routing.position)

    expected = run(lambda x, fc1, fc2, routing, weights: loop_over_experts(x, fc1, fc2, routing.experts, weights))
    for ours, theirs in zip(run(grouped), expected, strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-4)  # values up to 100, sums in another order


@BOTH
def test_no_rows_at_all_have_gradients_of_zero(operators):
    weight = torch.randn(4, 16, 8, requires_grad=True)
    rows = torch.empty(0, 8, requires_grad=True)
    hidden = operators.grouped_linear(rows, weight, torch.zeros(4, dtype=torch.int32))
    operators.weighted_swiglu(hidden, torch.empty(0)).sum().backward()
    assert rows.grad.shape == (0, 8) and not weight.grad.any()


@pytest.mark.parametrize("ffn", [8, 24, 3000])
def test_swiglu_of_any_width_equals_the_plain_version(ffn):
    generator = torch.Generator().manual_seed(4)
    hidden, weight, grad = (torch.randn(*shape, generator=generator) for shape in ((9, 2 * ffn), (9,), (9, ffn)))
    results = []
    for operators in (moe_reference, moe):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        output = operators.weighted_swiglu(*leaves)
        output.backward(grad)
        results.append([output, *(leaf.grad for leaf in leaves)])
    for ours, plain in zip(*reversed(results), strict=True):
        assert_close(ours, plain, rtol=1e-5, atol=1e-4)  # the weight's gradient sums up to 3000 products


@pytest.mark.parametrize("counts", [[0, 1, 128, 129, 0, 300, 0], [5], [0, 9000]])
def test_the_table_of_a_grouped_product_lists_the_tiles_of_every_expert_in_order(counts):
    from kernels.grouped_hopper import Groups

    groups = Groups(torch.tensor(counts).cumsum(0, dtype=torch.int32), sum(counts))
    expected, end = [], 0
    for expert, count in enumerate(counts):
        start, end = end, end + count
        expected += [[expert, first, end] for first in range(start, end, 192)]
    assert groups.total.item() == len(expected)
    assert groups.table[:, : len(expected)].t().tolist() == expected


def test_launches_overlap_but_not_in_the_interpreter(monkeypatch):
    assert overlap.overlapping() == {"OVERLAP": False}
    monkeypatch.setattr(overlap, "INTERPRETED", False)
    assert overlap.overlapping() == {"OVERLAP": True, "launch_pdl": True}


def test_wrong_arguments_are_named():
    with pytest.raises(KernelError, match="logits are torch.float64"):
        moe.route(torch.zeros(2, 1, 4, dtype=torch.float64), None, 2, "sigmoid", balance=False)
    with pytest.raises(KernelError, match="active=5"):
        moe.route(torch.zeros(2, 1, 4), None, 5, "sigmoid", balance=False)
    with pytest.raises(KernelError, match="position is torch.int32"):
        moe.spread(torch.zeros(2, 4), torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int32))
    with pytest.raises(KernelError, match=r"weights are \[2, 3\]; they must be \[2, 2\]"):
        moe.spread(torch.zeros(2, 4), torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.int64))
