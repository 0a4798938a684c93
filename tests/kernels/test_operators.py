"""The Triton operators against the reference: a full layer and a sparse layer that reads it, values and gradients."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import KernelError, operators, reference
from tests.kernels.cases import Layers, relative_error, starts

DOCUMENTS = [[20, 1, 24], [33, 12]]  # 45 tokens: no multiple of any tile
SPARSE = ["hysparse", "hysparse_no_swa", "hysparse_own_kv", "hysparse_shared_swa", "hybrid_swa"]
# FP32 sums of up to 139 terms in another order; of a lone token the softmax's gradient is nothing but their rounding
FP32 = 2e-6


def compare(layers: Layers, variant: str, block: int = 16, selected: int = 2, window: int = 11):
    twin = layers.to(torch.float32)
    found, expected = (x.run(o, variant, block, selected, window) for x, o in ((layers, operators), (twin, reference)))
    for name, ours, theirs in zip(("full layer", "sparse layer"), found, expected, strict=True):
        assert relative_error(ours, theirs) < FP32, name
    gradients, truth = layers.gradients(found), twin.gradients(expected)
    assert gradients.keys() == truth.keys()
    for name, gradient in gradients.items():
        assert relative_error(gradient, truth[name]) < FP32, name


@pytest.mark.parametrize("variant", SPARSE)
def test_every_variant_equals_the_reference(variant):
    compare(Layers.random(starts(DOCUMENTS), H=4, K=2, D=16), variant)


@pytest.mark.parametrize("variant", SPARSE)
def test_gates_per_channel_equal_the_reference(variant):
    compare(Layers.random(starts([[9, 7]]), H=4, K=1, D=16, gate_width=16), variant)


@pytest.mark.parametrize("group", [1, 2, 16, 32])
def test_groups_of_every_size_equal_the_reference(group):
    compare(Layers.random(starts([[18, 5]]), H=2 * group, K=2, D=16), "hysparse")


@pytest.mark.parametrize("block, selected", [(16, 3), (32, 1), (64, 2), (128, 1)])
def test_key_blocks_of_every_size_equal_the_reference(block, selected):
    compare(Layers.random(starts([[130, 9]]), H=4, K=1, D=16), "hysparse", block=block, selected=selected)


def test_keys_wider_than_values_equal_the_reference():
    compare(Layers.random(starts([[40, 35]]), H=4, K=2, D=192, values=128), "hysparse")


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [16], [17]])
def test_short_documents_equal_the_reference(lengths):
    compare(Layers.random(starts([lengths]), H=4, K=2, D=16), "hysparse")


@pytest.mark.parametrize("version", [operators, reference])
def test_ranks_that_share_a_kv_head_choose_the_blocks_of_all_its_query_heads(version):
    layers = Layers.random(starts([[70, 26]]), H=8, K=2, D=16)
    given = (layers.k, layers.v, layers.document_start, 16, 2)
    output, shared = version.oracle_attention(layers.q, *given)
    ranks = [layers.q.unflatten(2, (2, 2, 2))[:, :, :, rank].flatten(2, 3) for rank in range(2)]
    scores = []
    for q in ranks:
        version.oracle_attention(q, *given, None, lambda score: scores.append(score.clone()) or score)
    assert scores[0].shape == (1, 2, 96, 6) and not torch.equal(*(score.argmax(-1) for score in scores))
    for rank, q in enumerate(ranks):
        part, own = version.oracle_attention(q, *given, None, lambda score: torch.maximum(*scores))
        assert torch.equal(own.blocks, shared.blocks)
        ours = output.unflatten(2, (2, 2, 2))[:, :, :, rank].flatten(2, 3)
        torch.testing.assert_close(part, ours, rtol=0, atol=1e-6)  # other tiles, so other sums


def test_views_of_a_larger_tensor_equal_the_reference():
    layers = Layers.random(starts(DOCUMENTS), H=8, K=2, D=16)
    wide = torch.randn(45, 2, 8, 40)  # as from a fused projection, sequence first
    layers.sparse_q = wide[..., 3:19].transpose(0, 1).detach().requires_grad_()
    layers.sinks = torch.randn(8, 2).t().detach().requires_grad_()
    compare(layers, "hysparse")


def test_a_full_layer_with_sinks_equals_the_reference():
    """The sink takes its share of the softmax, moves the ranking between heads, and gets a gradient."""
    layers = Layers.random(starts(DOCUMENTS), H=4, K=2, D=16)
    twin = layers.to(torch.float32)
    found = []
    for version, x in ((operators, layers), (reference, twin)):
        given = x.q, x.k, x.v, x.document_start
        output, shared = version.oracle_attention(*given, 16, 2, sink=3 * x.sinks[0])
        plain = version.causal_attention(*given, sink=3 * x.sinks[0])
        assert not torch.equal(version.oracle_attention(*given, 16, 2)[1].blocks, shared.blocks)
        found.append((output, plain, shared.blocks, x.gradients((output, plain))))
    (output, plain, blocks, gradients), (*outputs, expected_blocks, truth) = found
    assert torch.equal(blocks, expected_blocks)
    for ours, theirs in zip((output, plain), outputs, strict=True):
        assert relative_error(ours, theirs) < FP32
    assert gradients.keys() == truth.keys() == {"q", "k", "v", "sinks"}
    for name, gradient in gradients.items():
        assert relative_error(gradient, truth[name]) < FP32, name


@pytest.mark.parametrize("first, window_start", [(0, -10), (0, 0), (32, 0), (32, 22), (32, 7)])
@pytest.mark.parametrize("version", [operators, reference], ids=["triton", "reference"])
def test_a_chunk_of_the_queries_gives_its_rows_of_the_whole(version, first, window_start):
    """Context parallelism: some queries, all keys, of the window perhaps only those from shortly before the chunk."""
    layers = Layers.random(starts([[40, 24]]), H=4, K=2, D=16)
    full, sparse = layers.run(version, "hysparse", 16, 2, 11)
    rows = slice(first, first + 32)  # a chunk starts at a multiple of the block
    chunk = layers.document_start[:, rows].contiguous()
    output, shared = version.oracle_attention(layers.q[:, rows], layers.k, layers.v, chunk, 16, 2, query_start=first)
    before = torch.ones(1, max(-window_start, 0), 2, 16)  # seen by nobody
    own = (torch.cat([before, x[:, max(window_start, 0) : first + 32]], 1) for x in (layers.own_k, layers.own_v))
    branches = [
        operators.Branch(*kv, sink, gate.sigmoid()[:, rows])
        for kv, sink, gate in zip((shared[:4], (*own, None, None)), layers.sinks, layers.gates, strict=True)
    ]
    places = {"query_start": first, "window_start": window_start}
    found = version.hybrid_attention(layers.sparse_q[:, rows], *branches, shared, chunk, 16, 11, **places)
    torch.testing.assert_close(output, full[:, rows], rtol=0, atol=1e-6)  # other tiles, so other sums
    torch.testing.assert_close(found, sparse[:, rows], rtol=0, atol=1e-6)
    alone = version.hybrid_attention(layers.sparse_q[:, rows], None, branches[1], shared, chunk, 16, 11, **places)
    window = layers.run(version, "hybrid_swa", 16, 2, 11)[1]
    torch.testing.assert_close(alone, window[:, rows], rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", ["hysparse", "hybrid_swa"])
@pytest.mark.parametrize("width", [1, 16])
def test_gates_in_fp32_leave_the_dtype_of_the_query(variant, width):
    layers = Layers.random(starts([[20]]), H=4, K=2, D=16, dtype=torch.float16, gate_width=width)
    layers.gates = layers.gates.detach().float()
    ours, theirs = (layers.run(version, variant, 16, 2, 11)[1] for version in (operators, reference))
    assert ours.dtype == theirs.dtype == torch.float16
    assert relative_error(ours, theirs) < 4e-3  # FP16's rounding of a few intermediate results


def test_gradients_of_shared_keys_add_up_in_fp32():
    """In half precision, many sparse layers on one full layer: each gradient alone would be rounded before the sum."""
    layers = Layers.random(starts([[48]]), H=4, K=1, D=16, dtype=torch.float16)
    output, shared = operators.oracle_attention(layers.q, layers.k, layers.v, layers.document_start, 16, 2)
    assert shared.k_gradient.dtype == torch.float32 and shared.k_gradient.untyped_storage().nbytes() == 4
    branch = operators.Branch(*shared[:4], layers.sinks[0])
    once = operators.hybrid_attention(layers.sparse_q, branch, None, shared, layers.document_start, 16, 11)
    (gradient,) = torch.autograd.grad(once.sum(), shared.v_gradient, retain_graph=True)
    assert gradient.dtype == torch.float32
    many = sum(
        operators.hybrid_attention(layers.sparse_q, branch, None, shared, layers.document_start, 16, 11).sum()
        for _ in range(16)
    )
    (sixteen,) = torch.autograd.grad(many, shared.v_gradient, retain_graph=True)
    assert relative_error(sixteen, 16 * gradient) < 1e-6  # in FP16 sixteen roundings would leave 1e-3
    (finished,) = torch.autograd.grad(many, layers.v)
    assert finished.dtype == torch.float16 and relative_error(finished, 16 * gradient) < 2**-11


def test_a_selection_that_was_made_before_is_taken_over():
    layers = Layers.random(starts(DOCUMENTS), H=8, K=2, D=16)
    inputs = (layers.q, layers.k, layers.v, layers.document_start, 16, 2)
    for version in (operators, reference):
        output, shared = version.oracle_attention(*inputs)
        again, shared_again = version.oracle_attention(*inputs, selection=shared.selection)
        assert torch.equal(output, again)
        assert all(a is b for a, b in zip(shared.selection, shared_again.selection, strict=True))


def test_meta_tensors_have_the_shapes_of_real_ones():
    real = Layers.random(starts(DOCUMENTS), H=8, K=2, D=16)
    shapes = [x.shape for x in real.run(operators, "hysparse", 16, 2, 11)]
    _, shared = operators.oracle_attention(real.q, real.k, real.v, real.document_start, 16, 2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = Layers.random(torch.empty(2, 45, dtype=torch.int32), H=8, K=2, D=16)
        outputs = fake.run(operators, "hysparse", 16, 2, 11)
        gradients = fake.gradients(outputs)
        _, fake_shared = operators.oracle_attention(fake.q, fake.k, fake.v, fake.document_start, 16, 2)
    assert [x.shape for x in outputs] == shapes
    assert {name: x.shape for name, x in gradients.items()} == {name: getattr(real, name).shape for name in gradients}
    assert [(x.shape, x.dtype) for x in fake_shared] == [(x.shape, x.dtype) for x in shared]


@pytest.mark.parametrize("variant", ["hysparse", "hybrid_swa"])
def test_torch_compile_takes_both_layers_in_one_graph(variant):
    layers = Layers.random(starts(DOCUMENTS), H=4, K=2, D=16)
    twin = layers.to(torch.float32)
    compiled = torch.compile(layers.run, fullgraph=True, backend="aot_eager")
    found, expected = (run(operators, variant, 16, 2, 11) for run in (compiled, twin.run))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(layers.gradients(found), twin.gradients(expected))


@pytest.mark.parametrize("name", ["full_attention", "sparse_attention", "window_attention", "index"])
def test_registrations_hold_what_torch_asks_of_an_operator(name):
    """Schema, meta shapes and autograd registration against real calls."""
    layers = Layers.random(starts([[20, 5]]), H=4, K=2, D=16)
    q, k, v, start = layers.q, layers.k, layers.v, layers.document_start
    _, shared = operators.oracle_attention(q, k, v, start, 16, 2)
    gates = layers.gates.sigmoid().squeeze(-1).detach()
    arguments = {
        "full_attention": (q, k, v, layers.sinks[0].detach(), start, 16, 2, 0),
        "index": (shared.blocks, 16, 25, 2),
        "window_attention": (q, k, v, layers.sinks[0].detach(), start, 11, 0),
        "sparse_attention": (
            *(q, k.detach(), v.detach(), shared.k_gradient.detach(), shared.v_gradient.detach(), k, v, None, None),
            *(*layers.sinks.detach(), *gates, start, list(shared.selection), 16, 11, 0, 0),
        ),
    }[name]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.hysparse, name).default, arguments, test_utils=checks)


def test_a_very_small_log_sum_exp_of_the_first_token_harms_nobody():
    """Steps of a kernel that are not full read the first token's: exp2 of minus it would be infinite."""
    layers = Layers.random(starts([[23]]), H=4, K=1, D=16)
    with torch.no_grad():
        layers.sparse_q[:, 0] = -40 * layers.k[:, 0]
    layers.sinks = torch.full_like(layers.sinks, -1e4).requires_grad_()  # as good as none
    compare(layers, "hysparse")


@pytest.mark.parametrize("part_bytes", [1, 40_000])
def test_kv_heads_that_do_not_fit_together_take_turns(part_bytes, monkeypatch):
    monkeypatch.setattr("kernels.sparse_forward.PART_BYTES", part_bytes)
    compare(Layers.random(starts([[20, 10], [30]]), H=6, K=3, D=16), "hysparse")


def test_blocks_that_many_tokens_chose_are_worked_on_in_pieces(monkeypatch):
    monkeypatch.setattr("kernels.selection.PIECE_ROWS", 32)  # 8 of up to 64 tokens of a chunk, fewer than see a part
    compare(Layers.random(starts([[130, 9]]), H=4, K=1, D=16), "hysparse")


def test_starts_blocks_and_queries_of_any_strides_equal_the_reference():
    layers = Layers.random(starts(DOCUMENTS), H=4, K=2, D=16)
    layers.document_start = starts([[20, 25]]).expand(2, -1)
    layers.sparse_q = torch.randn(2, 45, 4, 32)[..., ::2].requires_grad_()
    compare(layers, "hysparse")


def test_a_branch_without_a_gate_beside_one_with_a_gate_per_channel():
    layers = Layers.random(starts([[20]]), H=4, K=2, D=16, gate_width=16)
    outputs = []
    for version in (operators, reference):
        _, shared = version.oracle_attention(layers.q, layers.k, layers.v, layers.document_start, 16, 2)
        sparse = operators.Branch(*shared[:4], layers.sinks[0])
        window = operators.Branch(layers.own_k, layers.own_v, None, None, layers.sinks[1], layers.gates[1])
        outputs.append(version.hybrid_attention(layers.sparse_q, sparse, window, shared, layers.document_start, 16, 11))
    assert relative_error(*outputs) < FP32


@pytest.mark.parametrize(
    "change, message",
    [
        ({"window_size": 0}, "window is 0; a query sees itself"),
        ({"block": 48}, "block is 48; the kernels take 16, 32, 64, 128"),
        (
            {"block": 128, "q": torch.randn(1, 20, 4, 192)}
            | {name: lambda x: x._replace(k=torch.randn(1, 20, 2, 192)) for name in ("sparse", "window")},
            "block is 128 with head dimensions 192 and 16; above 128 use 64 or less",
        ),
        ({"block": 32}, "it is of another selection, block or number of keys"),
        ({"document_start": starts([[20]])[:, :7]}, r"document_start is torch.int32 \[1, 7\]"),
        ({"q": torch.randn(1, 20, 4, 24)}, "q has head dimension 24, k 16"),
        ({"sparse": lambda branch: branch._replace(sink=torch.zeros(2))}, r"sparse sink has shape \[2\] .* \[4\]"),
        ({"q": torch.randn(1, 20, 6, 16)}, "q has 3 heads for each of k; the kernels take a power of two"),
        ({"window": lambda x: x._replace(k=x.k[:, :, :1], v=x.v[:, :, :1])}, "v has 2 KV heads, window_v 1"),
        ({"window": lambda x: x._replace(v=torch.cat([x.v, x.v], -1))}, "v has head dimension 16, window_v 32"),
        ({"sparse": None, "window": None}, "sparse and window are both None"),
        ({"shared": lambda x: x._replace(blocks=None)}, "shared.blocks is None"),
        ({"shared": lambda x: x._replace(entries=None)}, "shared has blocks but no index"),
        ({"shared": lambda x: x._replace(blocks=x.blocks[..., :0])}, r"blocks is torch.int32 \[1, 2, 20, 0\]"),
        ({"shared": lambda x: x._replace(entries=x.entries.long())}, "index.entries is torch.int64"),
        ({"window": lambda x: x._replace(gate=torch.rand(1, 20, 4, 16, device="meta"))}, "window.gate .* on meta"),
        ({"window": lambda x: x._replace(gate=torch.rand(1, 20, 4))}, r"window.gate has shape \[1, 20, 4\]"),
        ({"sparse": lambda x: x._replace(gate=torch.rand(1, 20, 4, 3))}, r"sparse.gate has shape \[1, 20, 4, 3\]"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    layers = Layers.random(starts([[20]]), H=4, K=2, D=16)
    _, shared = operators.oracle_attention(layers.q, layers.k, layers.v, layers.document_start, 16, 2)
    arguments = {
        "q": layers.sparse_q,
        "sparse": operators.Branch(*shared[:4]),
        "window": operators.Branch(layers.own_k, layers.own_v),
        "shared": shared,
        "document_start": layers.document_start,
        "block": 16,
        "window_size": 11,
    }
    change = {name: x(arguments[name]) if callable(x) else x for name, x in change.items()}
    with pytest.raises(KernelError, match=message):
        operators.hybrid_attention(**arguments | change)


@pytest.mark.parametrize("selected", [0, -1])
def test_an_oracle_that_selects_nothing_is_refused(selected):
    layers = Layers.random(starts([[20]]), H=4, K=2, D=16)
    with pytest.raises(KernelError, match=f"selected={selected}; select one block at least, or use causal_attention"):
        operators.oracle_attention(layers.q, layers.k, layers.v, layers.document_start, 16, selected)


def test_documents_that_start_behind_their_query_are_named_in_every_layer_when_debugging(monkeypatch):
    layers = Layers.random(starts([[20]]), H=4, K=2, D=16)
    given, start = (layers.q, layers.k, layers.v), layers.document_start.clone()
    _, shared = operators.oracle_attention(*given, start, 16, 2)
    start[0, 7] = 9
    monkeypatch.setenv("HYSPARSE_DEBUG", "1")
    branch = operators.Branch(*shared[:4])
    for call in (
        lambda: operators.oracle_attention(*given, start, 16, 2),
        lambda: operators.window_attention(*given, start, 11, None),
        lambda: operators.hybrid_attention(layers.sparse_q, branch, None, shared, start, 16, 11),
    ):
        with pytest.raises(KernelError, match=r"document_start\[0, 7\] is 9; it must be between 0"):
            call()
