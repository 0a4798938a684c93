"""The mixture-of-experts operators and layer in BF16 on a GPU, against a loop over experts in FP64."""

import pytest
import torch

from kernels import moe_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

HIDDEN, FFN = 256, 128
WIDE_FFN = 256  # for which there are products of our own on Hopper


def poison() -> None:
    """What fresh memory holds afterwards is NaN, as long as nobody else takes it."""
    torch.cuda.empty_cache()
    torch.full((64 << 20,), float("nan"), device="cuda")


def random(*shape: int, dtype=torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


def loop(x, fc1, fc2, experts, weights):
    """Expert after expert, in the dtype of x."""
    y = torch.zeros_like(x)
    for e in range(len(fc1)):
        token, place = (experts == e).nonzero(as_tuple=True)
        gate, up = (x[token] @ fc1[e].t()).chunk(2, dim=1)
        y = y.index_add(0, token, weights[token, place, None] * ((torch.nn.functional.silu(gate) * up) @ fc2[e].t()))
    return y


def grouped(x, fc1, fc2, routing, weights):
    from kernels import moe

    rows, weights = moe.spread(x, weights, routing.position)
    rows = moe.weighted_swiglu(moe.grouped_linear(rows, fc1, routing.offsets), weights)
    return moe.combine(moe.grouped_linear(rows, fc2, routing.offsets), routing.position)


def gradients(forward, dtype, tensors, grad):
    leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors]
    y = forward(*leaves)
    y.backward(grad.to(dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("tokens, E, active", [(1, 8, 2), (333, 8, 2), (1000, 64, 8), (700, 512, 8)])
@pytest.mark.parametrize("routed", ["spread", "few experts"])
@pytest.mark.parametrize("ffn", [FFN, WIDE_FFN])
def test_experts_are_as_exact_as_a_loop_in_bf16_and_the_same_each_time(tokens, E, active, routed, ffn):
    from kernels import moe

    logits = random(tokens, 1, E, dtype=torch.float32, seed=1)
    if routed == "few experts":
        logits[..., active:] -= 100
    routing = moe.route(logits, None, active, "sigmoid", balance=False)
    tensors = [random(tokens, HIDDEN), random(E, 2 * ffn, HIDDEN, seed=2) / 16, random(E, HIDDEN, ffn, seed=3) / 11]
    grad = random(tokens, HIDDEN, seed=4)

    def run(dtype):  # the routing weights are leaves as well, in FP32 for ours
        weights = routing.weights.to(dtype, copy=True).requires_grad_()
        results = gradients(lambda *leaves: loop(*leaves, routing.experts, weights), dtype, tensors, grad)
        return [*results, weights.grad]

    def ours():
        poison()
        weights = routing.weights.clone().requires_grad_()
        results = gradients(lambda *leaves: grouped(*leaves, routing, weights), torch.bfloat16, tensors, grad)
        return [*results, weights.grad]

    exact, plain, first, second = run(torch.float64), run(torch.bfloat16), ours(), ours()
    for name, truth, rough, mine, again in zip(
        ("y", "x", "fc1", "fc2", "weights"), exact, plain, first, second, strict=True
    ):
        assert torch.equal(mine, again), name
        error, allowed = ((z.double() - truth).norm() / truth.norm() for z in (mine, rough))
        assert error <= 2 * allowed + 1e-3, f"{name}: {error:.1e}, in BF16 {allowed:.1e}"
    idle = routing.counts == 0
    assert not first[2][idle].any() and not first[3][idle].any()


def test_kernels_that_overlap_leave_the_same_bits(monkeypatch):
    """Two inputs in turns: a kernel that read before the one ahead had written would find numbers of the other."""
    from kernels import moe, overlap

    tokens, E, active = 1000, 64, 8
    weights = [random(E, 2 * WIDE_FFN, HIDDEN, seed=2) / 16, random(E, HIDDEN, WIDE_FFN, seed=3) / 16]
    fc1, fc2 = (weight.requires_grad_() for weight in weights)
    grad, bias = random(tokens, HIDDEN, seed=4), random(E, dtype=torch.float32, seed=5) * 0.1
    xs = [random(tokens, HIDDEN, seed=seed).requires_grad_() for seed in (6, 7)]
    logits = [random(tokens, 1, E, dtype=torch.float32, seed=seed).requires_grad_() for seed in (8, 9)]

    def run(which):
        routing = moe.route(logits[which], bias, active, "sigmoid", balance=True)
        load = torch.zeros(E, dtype=torch.int64, device="cuda")
        moe.tally(routing, load)
        y = grouped(xs[which], fc1, fc2, routing, routing.weights)
        loss = (y * grad).sum() + routing.score_sums.square().sum()
        return [load, y, *torch.autograd.grad(loss, (xs[which], logits[which], fc1, fc2))]

    monkeypatch.setattr(overlap, "INTERPRETED", True)  # launched one after the other
    expected = [run(which) for which in (0, 1)]
    monkeypatch.setattr(overlap, "INTERPRETED", False)
    for number, results in enumerate([run(number % 2) for number in range(40)]):
        for ours, exact in zip(results, expected[number % 2], strict=True):
            assert torch.equal(ours, exact), number


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out, inside", [(256, 512), (1024, 256)])
@pytest.mark.parametrize(
    "counts",
    [
        [0, 1, 63, 64, 65, 0, 127, 128, 129, 300, 0],
        [1],
        [0, 0, 5000],
        [192] * 300,
        [64, 1, 0, 70, 300, 129, 2, 128, 500] * 30 + [60] * 300,  # few rows an expert, but not everywhere
    ],
)
def test_grouped_products_for_hopper_equal_a_loop_over_experts_and_leave_nothing_unwritten(counts, out, inside, dtype):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for compute capability 9.0")
    from kernels import grouped_hopper

    N, E = sum(counts), len(counts)
    rows, grad = random(N, inside, dtype=dtype, seed=1), random(N, out, dtype=dtype, seed=2)
    weight = random(E, out, inside, dtype=dtype, seed=3)
    offsets = torch.tensor(counts, device="cuda").cumsum(0, dtype=torch.int32)
    assert grouped_hopper.supported(rows, weight)
    parts = zip(rows.double().split(counts), grad.double().split(counts), weight.double(), strict=True)
    truth = [(x @ w.t(), g @ w, g.t() @ x) for x, g, w in parts]
    truth = [
        torch.cat([one[0] for one in truth]),
        torch.cat([one[1] for one in truth]),
        torch.stack([t[2] for t in truth]),
    ]

    def run():
        poison()
        groups = grouped_hopper.Groups(offsets, N)
        return (
            grouped_hopper.multiply(rows, weight, groups, False),
            grouped_hopper.multiply(grad, weight, groups, True),
            grouped_hopper.weight_gradient(grad, rows, offsets),
        )

    for mine, again, exact in zip(run(), run(), truth, strict=True):
        assert torch.equal(mine, again)
        # the result is rounded once; the tensor cores' FP32 sums of up to 5000 products err by far less
        step = torch.finfo(dtype).eps / 2
        assert ((mine.double() - exact).abs() <= 1.01 * step * exact.abs() + 1e-4 * exact.abs().max()).all()


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("S, B, E, active", [(4096, 1, 512, 8), (1000, 3, 64, 8), (77, 2, 12, 3), (1, 1, 512, 8)])
def test_routing_equals_the_plain_version(S, B, E, active, biased, score):
    from kernels import moe

    bias = random(E, dtype=torch.float32, seed=5) * 0.1 if biased else None
    results = []
    for operators in (moe_reference, moe):
        poison()
        logits = random(S, B, E, dtype=torch.float32, seed=6).requires_grad_()
        routing = operators.route(logits, bias, active, score, balance=True)
        loss = (routing.weights * random(S * B, active, dtype=torch.float32, seed=7)).sum()
        (loss + (routing.score_sums * random(B, E, dtype=torch.float32, seed=8)).sum()).backward()
        results.append((routing, logits.grad))
    (plain, plain_grad), (ours, grad) = results
    # the device's exp and division differ in the last bit: where two scores nearly tie, the order may
    same = (ours.experts == plain.experts).all(1)
    assert same.float().mean() > 0.999
    assert (ours.offsets - plain.offsets).abs().max() <= (~same).sum()
    torch.testing.assert_close(ours.weights[same], plain.weights[same], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.score_sums, plain.score_sums, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad.flatten(0, 1)[same], plain_grad.flatten(0, 1)[same], rtol=1e-3, atol=1e-5)
    assert torch.equal(ours.position.flatten().sort().values, torch.arange(S * B * active, device="cuda"))


def test_the_layer_never_waits_for_the_device(megatron):
    """A pass of Megatron's layer with our experts, both losses and the bias on."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.spec_utils import build_module

    from hysparse.ffn import ffn_spec
    from hysparse.model import transformer_config
    from kernels import operators
    from tests.models import small_config

    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=megatron))  # as a training step does
    config = small_config()
    layer = build_module(ffn_spec(config.model, 0, operators.moe), config=transformer_config(config, [], bf16=True))
    layer.to(megatron).train().set_layer_number(1)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(std=0.1)
    x = random(40, 2, config.model.hidden).requires_grad_()
    for mode in ("default", "error"):  # once to compile
        torch.cuda.set_sync_debug_mode(mode)
        try:
            layer(x)[0].square().sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert x.grad.isfinite().all() and layer.router.load.sum() == 2 * 80 * config.model.moe.active
