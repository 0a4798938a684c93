"""The operators of a hybrid block on a GPU against FP64, within the error of dense attention in the same dtype."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hysparse.plain import attend, tokens_of_blocks
from kernels import Branch, SharedKV, causal_hopper, operators, sparse_hopper
from kernels.selection import build_index
from tests.kernels.cases import Layers, relative_error, starts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = {"80b": (64, 4), "7b": (32, 8)}
BLOCK, SELECTED, WINDOW = 64, 6, 128
DOCUMENTS = [[300, 1, 350, 349]]  # 1000 tokens


def poison() -> None:
    """Fill the memory that the next allocations get with NaN: what a kernel leaves unwritten shows."""
    for _ in range(2):
        filled = torch.full((2**28,), torch.nan, device="cuda")
        del filled


def visible_pairs(document_start: Tensor) -> Tensor:
    """[B, 1, S, S]"""
    t = torch.arange(document_start.shape[1], device="cuda")
    return ((t <= t[:, None]) & (t >= document_start[:, :, None]))[:, None]


def exact(layers: Layers, blocks: Tensor, variant: str, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Both layers' outputs in FP64, by masks, for a given selection."""
    visible = visible_pairs(layers.document_start)
    S = visible.shape[-1]
    t = torch.arange(S, device="cuda")
    full, _ = attend(layers.q, layers.k, layers.v, visible)
    lent, own = (layers.k, layers.v), (layers.own_k, layers.own_v)
    of_sparse, of_window = {
        "hysparse": (lent, own),
        "hysparse_shared_swa": (lent, lent),
        "hysparse_no_swa": (own, None),
    }[variant]
    in_blocks = visible & tokens_of_blocks(blocks, block, S)
    output = layers.gates[0].sigmoid() * attend(layers.sparse_q, *of_sparse, in_blocks, layers.sinks[0])[0]
    if of_window:
        near = visible & (t > t[:, None] - WINDOW)
        output = output + layers.gates[1].sigmoid() * attend(layers.sparse_q, *of_window, near, layers.sinks[1])[0]
    return full, output


def dense_errors(layers: Layers) -> dict[str, float]:
    """Relative errors of PyTorch's dense causal attention in that dtype: output, and gradients of q, k and v."""
    inputs = [x.detach().transpose(1, 2).clone().requires_grad_() for x in (layers.q, layers.k, layers.v)]
    wide = [x.detach().double().transpose(1, 2).requires_grad_() for x in inputs]
    output = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    S = output.shape[2]
    causal = torch.ones(1, 1, S, S, dtype=torch.bool, device="cuda").tril()
    truth = attend(*wide, causal)[0].transpose(1, 2)
    grad = torch.randn_like(output)
    found = output, *torch.autograd.grad(output, inputs, grad)
    expected = truth, *torch.autograd.grad(truth, wide, grad.double())
    errors = [
        relative_error(x, y if y.shape == x.shape else y.transpose(1, 2)) for x, y in zip(found, expected, strict=True)
    ]
    return dict(zip(("output", "q", "k", "v"), errors, strict=True))


LAYERS = "full layer", "sparse layer"
LIKE = {  # what of dense attention a tensor is held against; sinks and gates have no counterpart: the worst
    **{"full layer": "output", "sparse layer": "output", "q": "q", "sparse_q": "q"},
    **{"k": "k", "own_k": "k", "v": "v", "own_v": "v"},
}


@pytest.mark.parametrize("variant", ["hysparse", "hysparse_shared_swa", "hysparse_no_swa"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_as_exact_as_dense_attentions(shape, variant):
    layers = Layers.random(starts(DOCUMENTS, "cuda"), *SHAPES[shape], 128, dtype=torch.bfloat16)
    check_against_fp64(layers, variant, dense=dense_errors(layers))


def test_keys_wider_than_values_are_as_exact_as_dense_attention():
    """That of 128 wide heads, whose logits are as large: of these PyTorch may compute more in FP32."""
    H, K = 32, 2
    documents = starts([[300, 377]], "cuda")
    layers = Layers.random(documents, H, K, 192, dtype=torch.bfloat16, values=128)
    dense = Layers.random(documents, H, K, 128, dtype=torch.bfloat16)
    check_against_fp64(layers, "hysparse", dense=dense_errors(dense))


@pytest.mark.parametrize("shape", SHAPES)
def test_one_token_is_its_own_value_in_both_branches(shape):
    layers = Layers.random(starts([[1]], "cuda"), *SHAPES[shape], 128, dtype=torch.bfloat16)
    few = dict.fromkeys(("output", "q", "k", "v"), 5e-3)  # one key and the sink: few roundings of BF16
    check_against_fp64(layers, "hysparse", dense=few)


@pytest.mark.parametrize("shape", SHAPES)
def test_fp16_is_as_exact_as_dense_attention(shape):
    layers = Layers.random(starts(DOCUMENTS, "cuda"), *SHAPES[shape], 128, dtype=torch.float16)
    check_against_fp64(layers, "hysparse", dense=dense_errors(layers))


@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_key_blocks_of_other_sizes_are_as_exact_as_dense_attention(shape, block):
    layers = Layers.random(starts(DOCUMENTS, "cuda"), *SHAPES[shape], 128, dtype=torch.bfloat16)
    check_against_fp64(layers, "hysparse", dense=dense_errors(layers), block=block)


def check_against_fp64(layers: Layers, variant: str, dense: dict[str, float], block: int = BLOCK) -> None:
    """Outputs and gradients of both layers, for the selection that the operators made: within twice dense's error."""
    twin = layers.to(torch.float64)
    _, shared = operators.oracle_attention(layers.q, layers.k, layers.v, layers.document_start, block, SELECTED)
    poison()
    outputs = layers.run(operators, variant, block, SELECTED, WINDOW)
    found = dict(zip(LAYERS, outputs, strict=True)) | layers.gradients(outputs)  # before the truth: memory is poisoned
    expected = exact(twin, shared.blocks, variant, block)
    compare(found, dict(zip(LAYERS, expected, strict=True)) | twin.gradients(expected), dense)


def compare(found: dict[str, Tensor], truth: dict[str, Tensor], dense: dict[str, float]) -> None:
    assert found.keys() == truth.keys()
    worst = max(dense.values())
    errors = {name: relative_error(x, truth[name]) / dense.get(LIKE.get(name), worst) for name, x in found.items()}
    assert max(errors.values()) < 2, errors


@pytest.mark.parametrize("shape", SHAPES)
def test_a_full_layer_with_sinks_is_as_exact_as_dense_attention(shape):
    layers = Layers.random(starts(DOCUMENTS, "cuda"), *SHAPES[shape], 128, dtype=torch.bfloat16)
    twin = layers.to(torch.float64)
    poison()
    given = layers.q, layers.k, layers.v, layers.document_start
    output, _ = operators.oracle_attention(*given, BLOCK, SELECTED, sink=layers.sinks[0])
    found = {"full layer": output} | layers.gradients((output,))
    expected, _ = attend(twin.q, twin.k, twin.v, visible_pairs(layers.document_start), twin.sinks[0])
    compare(found, {"full layer": expected} | twin.gradients((expected,)), dense_errors(layers))


@pytest.mark.parametrize("H, K", [(64, 4), (32, 8), (4, 2), (3, 3), (32, 1)])
def test_the_kernels_for_hopper_and_those_for_all_other_cases_agree(H, K, monkeypatch):
    """They round the same numbers at the same places, but add up in another order."""

    def results() -> list[Tensor]:
        layers = Layers.random(starts(DOCUMENTS, "cuda"), H, K, 128, dtype=torch.bfloat16)
        poison()
        outputs = layers.run(operators, "hysparse", BLOCK, SELECTED, WINDOW)
        return [*outputs, *layers.gradients(outputs).values()]

    on_hopper = results()
    for module in (causal_hopper, sparse_hopper):
        monkeypatch.setattr(module, "supported", lambda *_: False)
    for ours, theirs in zip(on_hopper, results(), strict=True):
        assert relative_error(ours, theirs) < 2**-8  # of BF16 a unit in the last place


@pytest.mark.parametrize("shape", SHAPES)
def test_a_chunk_of_the_queries_gives_its_rows_and_its_share_of_the_gradients(shape):
    """Context parallelism: chunks of the queries, each with all keys; their gradients of the keys add up."""
    H, K = SHAPES[shape]
    layers = Layers.random(starts([[300, 1, 350, 373]], "cuda"), H, K, 128, dtype=torch.bfloat16)
    lent, own = Branch(layers.k, layers.v), Branch(layers.own_k, layers.own_v)
    grad = torch.randn_like(layers.sparse_q)
    leaves = [layers.sparse_q, layers.k, layers.v, layers.own_k, layers.own_v]

    def run(rows: slice) -> tuple[Tensor, ...]:
        start, document_start = rows.start or 0, layers.document_start[:, rows].contiguous()
        q, sparse_q = layers.q[:, rows], layers.sparse_q[:, rows]
        at = {"query_start": start}
        _, shared = operators.oracle_attention(q, layers.k, layers.v, document_start, BLOCK, SELECTED, **at)
        output = operators.hybrid_attention(sparse_q, lent, own, shared, document_start, BLOCK, WINDOW, **at)
        return output, *torch.autograd.grad(output, leaves, grad[:, rows])

    whole, first, second = (run(rows) for rows in (slice(None), slice(512), slice(512, None)))
    assert relative_error(torch.cat([first[0], second[0]], 1), whole[0]) < 2**-8
    for found, other, expected in zip(first[1:], second[1:], whole[1:], strict=True):
        assert relative_error(found.float() + other.float(), expected) < 2**-8


@pytest.mark.parametrize("shape", SHAPES)
def test_two_runs_give_the_same_bits(shape):
    H, K = SHAPES[shape]
    runs = []
    for _ in range(2):
        layers = Layers.random(starts([[1500, 548]], "cuda"), H, K, 128, dtype=torch.bfloat16)
        poison()
        outputs = layers.run(operators, "hysparse", BLOCK, SELECTED, WINDOW)
        runs.append([*outputs, *layers.gradients(outputs).values()])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def sparse_only(layers: Layers, blocks: Tensor, sink: Tensor | None) -> Tensor:
    """The block-sparse branch alone, on a selection made by hand."""
    keys = layers.k.shape[1]
    index = build_index(blocks, BLOCK, keys, layers.sparse_q.shape[2] // layers.k.shape[2])
    shared = SharedKV(None, None, None, None, blocks, *index)
    branch = Branch(layers.k, layers.v, sink=sink)
    return operators.hybrid_attention(layers.sparse_q, branch, None, shared, layers.document_start, BLOCK, WINDOW)


def test_all_tokens_may_choose_one_block():
    """Its work is split among many items, and added up again."""
    layers = Layers.random(starts([[20_000]], "cuda"), 16, 1, 128, dtype=torch.bfloat16)
    blocks = torch.full((1, 1, 20_000, 1), 0, dtype=torch.int32, device="cuda")
    poison()
    output = sparse_only(layers, blocks, layers.sinks[0])
    output.backward(torch.ones_like(output))
    k, v = (x.detach()[:, :BLOCK].double().requires_grad_() for x in (layers.k, layers.v))
    visible = torch.arange(BLOCK, device="cuda") <= torch.arange(20_000, device="cuda")[:, None]
    truth, _ = attend(layers.sparse_q.detach().double(), k, v, visible[None, None], layers.sinks[0].detach().double())
    truth.backward(torch.ones_like(truth))
    assert relative_error(output, truth) < 4e-3  # BF16 rounds to 2^-9, its operands and the result
    assert relative_error(layers.k.grad[:, :BLOCK], k.grad) < 1e-2  # of 20,000 rounded terms with both signs
    assert relative_error(layers.v.grad[:, :BLOCK], v.grad) < 4e-3
    assert not layers.k.grad[:, BLOCK:].any() and not layers.v.grad[:, BLOCK:].any()


def test_rows_without_any_block_are_zero_and_send_nothing_back():
    layers = Layers.random(starts([[100]], "cuda"), 16, 1, 128, dtype=torch.bfloat16)
    blocks = torch.full((1, 1, 100, 2), -1, dtype=torch.int32, device="cuda")
    poison()
    output = sparse_only(layers, blocks, None)
    output.backward(torch.ones_like(output))
    assert not output.any() and not layers.sparse_q.grad.any() and not layers.k.grad.any()


def test_offsets_beyond_31_bits():
    """Rows of q, k and v that lie 2^22 elements apart: the last of 600 tokens start behind element 2^31."""
    plain = Layers.random(starts([[600]], "cuda"), 16, 1, 128, dtype=torch.bfloat16)
    far = plain.to(torch.bfloat16)
    space = torch.empty(600, 2**22, dtype=torch.bfloat16, device="cuda")
    at = 0
    for name in ("q", "k", "v", "sparse_q", "own_k", "own_v"):
        x = getattr(plain, name)
        width = x.shape[2] * x.shape[3]
        view = space[:, at : at + width].view(1, 600, *x.shape[2:])
        view.copy_(x.detach())
        setattr(far, name, view.detach().requires_grad_())
        at += width
    results = []
    for layers in (plain, far):
        outputs = layers.run(operators, "hysparse", BLOCK, SELECTED, WINDOW)
        results.append([*outputs, *layers.gradients(outputs).values()])
    assert all(torch.equal(near, distant) for near, distant in zip(*results, strict=True))


def attend_one_kv_head(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, sink: Tensor | None = None):
    """`attend` of K = 1 without a copy of the keys for each query head: long ones would not fit in FP64."""
    logits = torch.einsum("bshd,btd->bhst", q, k[:, :, 0]) / math.sqrt(q.shape[-1])
    logits = logits.masked_fill(~visible, -math.inf)
    if sink is not None:
        logits = torch.cat([logits, sink.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], dim=-1)
    probability = logits.softmax(-1)[..., : k.shape[1]]
    return torch.einsum("bhst,btd->bshd", probability, v[:, :, 0]), probability.detach()


@pytest.mark.slow
def test_a_sequence_of_131072_tokens():
    """The last queries, whose offsets are the largest, against FP64: outputs, selection, and what they send back."""
    S, rows = 131_072, slice(131_072 - 16, 131_072)  # so few, since others may use the GPU at the same time
    layers = Layers.random(starts([[S]], "cuda"), 16, 1, 128, dtype=torch.bfloat16)
    poison()
    outputs = [output[:, rows] for output in layers.run(operators, "hysparse", BLOCK, 16, WINDOW)]
    gradients = layers.gradients(outputs)
    with torch.no_grad():
        _, shared = operators.oracle_attention(layers.q, layers.k, layers.v, layers.document_start, BLOCK, 16)
    chosen = shared.blocks[:, :, rows]
    last = {"q": layers.q[:, rows], "sparse_q": layers.sparse_q[:, rows], "gates": layers.gates[:, :, rows]}
    wide = replace(layers, **last).to(torch.float64)
    keys, t = torch.arange(S, device="cuda"), torch.arange(S, device="cuda")[rows, None]
    causal = (keys <= t)[None, None]
    full, probability = attend_one_kv_head(wide.q, wide.k, wide.v, causal)
    score = probability.unflatten(-1, (-1, BLOCK)).amax((1, -1))[0]  # [rows, blocks]
    worst_chosen = score.gather(1, chosen[0, 0].long()).amin(1)
    best_left = score.scatter(1, chosen[0, 0].long(), 0).amax(1)
    assert (worst_chosen >= best_left * (1 - 1e-5)).all()  # FP32 logits of size 4
    in_blocks = causal & tokens_of_blocks(chosen, BLOCK, S)
    gates, sinks = wide.gates.sigmoid(), wide.sinks
    sparse = gates[0] * attend_one_kv_head(wide.sparse_q, wide.k, wide.v, in_blocks, sinks[0])[0]
    seen = slice(rows.start - WINDOW, S)
    near, own = causal[..., seen] & (keys > t - WINDOW)[..., seen], (wide.own_k[:, seen], wide.own_v[:, seen])
    sparse = sparse + gates[1] * attend_one_kv_head(wide.sparse_q, *own, near, sinks[1])[0]
    for output, truth in zip(outputs, (full, sparse), strict=True):
        assert relative_error(output, truth) < 1e-2
    truths = wide.gradients((full, sparse))
    for name, gradient in gradients.items():
        if name in last:
            dim = 1 + (name == "gates")
            assert not gradient.narrow(dim, 0, rows.start).any(), name
            gradient = gradient.narrow(dim, rows.start, 16)
        assert relative_error(gradient, truths[name]) < 1e-2, name
