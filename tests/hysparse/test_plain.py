"""The plain model against what it is not made of: PyTorch's own attention, token-by-token loops, finite differences."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from hysparse.choices import Gate, RouterScore, Source
from hysparse.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig
from hysparse.plain import (
    FullAttention,
    PlainModel,
    SparseAttention,
    attend,
    layer_kinds,
    rotate,
    select_blocks,
)

VARIANTS = {
    "full": dict(ratio=0, sparse_kv=Source.none, window_kv=Source.none, output_gate=Gate.elementwise),
    "hybrid_swa": dict(ratio=2, sparse_kv=Source.none, window_kv=Source.own, gate=Gate.none),
    "hysparse": dict(ratio=2, sparse_kv=Source.shared, window_kv=Source.own),
    "hysparse_no_swa": dict(ratio=2, sparse_kv=Source.own, window_kv=Source.none),
    "hysparse_own_kv": dict(ratio=2, sparse_kv=Source.own, window_kv=Source.own),
    "hysparse_shared_swa": dict(ratio=2, sparse_kv=Source.shared, window_kv=Source.shared),
}
FEEDFORWARD = {
    "dense": dict(ffn=24),
    "sigmoid": dict(moe=MoEConfig(experts=4, active=2, ffn=12, z_loss=1e-3)),
    "softmax": dict(moe=MoEConfig(experts=4, active=2, ffn=12, score=RouterScore.softmax, bias_update_rate=0)),
}
STARTS = [[0] * 11 + [11] * 15, [0] * 26]  # documents of two rows; 26 tokens leave the last block of 4 half full
BASE = 10_000.0


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def attention_config(variant="hysparse", **changes):
    return AttentionConfig(**{"name": variant, "block": 4, "tokens": 8, "window": 5, **VARIANTS[variant], **changes})


def model_config(**changes):
    sizes = dict(name="tiny", layers=4, hidden=16, heads=4, kv_heads=2, head_dim=8, vocabulary=40, ffn=24, init_std=0.3)
    return ModelConfig(**{**sizes, **changes})


def build(variant="hysparse", attention=(), **changes):
    """A model whose norms and sinks are no longer 1 and 0, so that leaving one out shows."""
    torch.manual_seed(0)
    model = PlainModel(model_config(**changes), attention_config(variant, **dict(attention)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def batch(starts=STARTS, seed=1):
    start = torch.tensor(starts)
    return torch.randint(40, start.shape, generator=torch.Generator().manual_seed(seed)), start


def visible_keys(start):
    """[B, 1, S, S] by the definition, one pair at a time."""
    B, S = start.shape
    pairs = [[[int(start[b, t]) <= i <= t for i in range(S)] for t in range(S)] for b in range(B)]
    return torch.tensor(pairs).unsqueeze(1)


def attention_inputs(start, H=4, K=2, D=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    shapes = ((*start.shape, heads, D) for heads in (H, K, K))
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def torch_attention(q, k, v, visible):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 5, 1])
def test_attention_equals_pytorchs(window):
    start = torch.tensor(STARTS)
    q, k, v = attention_inputs(start)
    visible = visible_keys(start)
    if window:
        for t in range(26):
            visible[:, :, t, : max(0, t - window + 1)] = False
    o, probability = attend(q, k, v, visible)
    assert_close(o, torch_attention(q, k, v, visible), rtol=1e-5, atol=1e-6)  # FP32; sums in another order
    assert_close(probability.sum(-1), torch.ones(2, 4, 26))


def test_a_sink_scales_the_output_by_sigmoid_of_lse_minus_sink():
    start = torch.tensor(STARTS)
    q, k, v = attention_inputs(start, dtype=torch.float64)
    visible, sink = visible_keys(start), torch.tensor([-2.0, 0.0, 1.0, 5.0], dtype=torch.float64)
    logits = torch.einsum("bskgd,btkd->bkgst", q.unflatten(2, (2, 2)), k).flatten(1, 2) / math.sqrt(8)
    lse = logits.masked_fill(~visible, -math.inf).logsumexp(-1)  # [B, H, S]
    share = (lse - sink.view(1, 4, 1)).sigmoid().transpose(1, 2).unsqueeze(-1)
    assert_close(attend(q, k, v, visible, sink)[0], share * attend(q, k, v, visible)[0])


def test_rope_is_a_rotation_of_complex_numbers():
    x, position = torch.randn(2, 6, 3, 8, dtype=torch.float64), torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 3]])
    turned = torch.empty_like(x)
    for b in range(2):
        for s in range(6):
            for i in range(4):
                turn = torch.polar(torch.ones((), dtype=torch.float64), position[b, s].double() * BASE ** (-2 * i / 8))
                z = torch.complex(x[b, s, :, i], x[b, s, :, i + 4]) * turn
                turned[b, s, :, i], turned[b, s, :, i + 4] = z.real, z.imag
    assert_close(rotate(x, position, BASE), turned)


def blocks_by_hand(probability, start, K, block, selected):
    """Equation 3, the group maximum and the top-k for one token, block and head at a time."""
    B, H, S, _ = probability.shape
    chosen = torch.full((B, K, S, selected), -1, dtype=torch.int32)
    for b in range(B):
        for kv_head in range(K):
            for t in range(S):
                scores = []
                for j in range(-(-S // block)):
                    keys = [i for i in range(j * block, min((j + 1) * block, S)) if start[b][t] <= i <= t]
                    heads = range(kv_head * H // K, (kv_head + 1) * H // K)
                    if keys:
                        scores.append((-max(float(probability[b, h, t, i]) for h in heads for i in keys), j))
                for rank, (_, j) in enumerate(sorted(scores)[:selected]):
                    chosen[b, kv_head, t, rank] = j
    return chosen


@pytest.mark.parametrize("case", ["random", "ties", "more blocks than there are"])
def test_selection_equals_a_loop_over_tokens_blocks_and_heads(case):
    start = torch.tensor(STARTS)
    q, k, v = attention_inputs(start)
    if case == "ties":  # equal keys: every visible token has the same probability
        k = torch.zeros_like(k)
    selected = 9 if case == "more blocks than there are" else 3
    visible = visible_keys(start)
    _, probability = attend(q, k, v, visible)
    blocks = select_blocks(probability, visible, 2, 4, selected)
    assert blocks.shape == (2, 2, 26, selected)
    assert_close(blocks, blocks_by_hand(probability, STARTS, 2, 4, selected))
    if case == "ties":
        assert blocks[1, 0, 25].tolist() == [0, 1, 2]
        assert blocks[0, 0, 11].tolist() == [2, -1, -1]  # first token of a document that begins inside block 2
        assert blocks[0, 0, 17].tolist() == [2, 3, 4]


def test_a_visible_block_whose_probability_underflows_is_still_a_candidate():
    visible = visible_keys(torch.zeros(1, 8, dtype=torch.int64))
    probability = torch.zeros(1, 1, 8, 8)
    probability[..., 0] = 1
    blocks = select_blocks(probability, visible, kv_heads=1, block=2, selected=3)
    assert blocks[0, 0, [1, 3, 7]].tolist() == [[0, -1, -1], [0, 1, -1], [0, 1, 2]]


def test_selection_compares_heads_by_normalised_probability():
    """Head 0 has the larger logits, about equal; head 1 has smaller ones and is sure of block 1, and so decides."""
    flat, sure = torch.full((8,), 20.0), torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 9.0])
    flat[0] = 20.5
    q = torch.zeros(1, 8, 2, 8)
    q[0, 7] = torch.stack([flat, sure]) * math.sqrt(8)  # the last token's; keys are unit vectors: these are the logits
    k, visible = torch.eye(8).view(1, 8, 1, 8), visible_keys(torch.zeros(1, 8, dtype=torch.int64))
    blocks = select_blocks(attend(q, k, k, visible)[1], visible, kv_heads=1, block=4, selected=1)
    assert blocks[0, 0, 7].tolist() == [1]


@pytest.mark.parametrize("gate", list(Gate))
@pytest.mark.parametrize("window_kv", list(Source))
@pytest.mark.parametrize("sparse_kv", list(Source))
@torch.no_grad()
def test_a_sparse_layer_equals_equations_4_to_9_token_by_token(sparse_kv, window_kv, gate):
    """Keys and values are gathered and concatenated as the paper writes it, one token and head at a time."""
    attention = attention_config(sparse_kv=sparse_kv, window_kv=window_kv, gate=gate)
    if sparse_kv == window_kv == Source.none:
        with pytest.raises(ConfigError, match="window_kv"):
            SparseAttention(model_config(), attention)
        return
    full = FullAttention(model_config(qk_norm=True), attention).double()
    layer = SparseAttention(model_config(qk_norm=True), attention).double()
    torch.manual_seed(3)
    for parameter in (*full.parameters(), *layer.parameters()):
        torch.nn.init.normal_(parameter, std=0.5)
    start = torch.tensor(STARTS)
    B, S, H, G, D = 2, 26, 4, 2, 8
    visible, position = visible_keys(start), torch.arange(S) - start
    x = torch.randn(B, S, 16, dtype=torch.float64)
    _, source = full(torch.randn_like(x), visible, position, BASE, None)
    o, passed_on = layer(x, visible, position, BASE, source)
    assert passed_on is source

    def project(linear, norm=None):
        y = (x @ linear.weight.T).view(B, S, -1, D)
        return F.rms_norm(y, (D,), norm.weight, 1e-6) if norm else y

    q = rotate(project(layer.query, layer.query_norm), position, BASE)
    kv = {Source.shared: (source.k, source.v)}
    if layer.key is not None:
        kv[Source.own] = rotate(project(layer.key, layer.key_norm), position, BASE), project(layer.value)

    def branch_output(name, b, t, h):
        kind = getattr(layer, f"{name}_kv")
        if kind == Source.none:
            return 0
        read = range(max(0, t - 4), t + 1)
        if name == "sparse":
            blocks = [j for j in source.blocks[b, h // G, t].tolist() if j >= 0]
            read = [i for j in blocks for i in range(4 * j, 4 * j + 4)]
        read = [i for i in read if start[b, t] <= i <= t]
        k, v = (torch.stack([y[b, i, h // G] for i in read]) for y in kv[kind])
        exps = (k @ q[b, t, h] / math.sqrt(D)).exp()
        o = exps @ v / (exps.sum() + getattr(layer, f"{name}_sink")[h].exp())
        if gate != Gate.none:
            logit = (getattr(layer, f"{name}_gate").weight @ x[b, t]).view(H, -1)[h]  # [1] or [D]
            o = o / (1 + (-logit).exp())
        return o

    expected = torch.zeros(B, S, H, D, dtype=torch.float64)
    for b in range(B):
        for t in range(S):
            for h in range(H):
                expected[b, t, h] = branch_output("sparse", b, t, h) + branch_output("window", b, t, h)
    assert_close(o, expected.flatten(2) @ layer.output.weight.T)


@pytest.mark.parametrize("output_gate", list(Gate))
def test_the_full_model_equals_its_restatement_in_torch_functions(output_gate):
    model = build("full", {"output_gate": output_gate}, qk_norm=True, layers=2)
    tokens, start = batch()
    position, visible = torch.arange(26) - start, visible_keys(start)
    weight = model.state_dict()

    def norm(x, name):
        return F.rms_norm(x, x.shape[-1:], weight[f"{name}.weight"], 1e-6)

    def project(x, name):
        return F.linear(x, weight[f"{name}.weight"])

    x = weight["embedding.weight"][tokens]
    for layer in ("layers.0", "layers.1"):
        y = norm(x, f"{layer}.attention_norm")
        q, k, v = (project(y, f"{layer}.attention.{name}").view(2, 26, -1, 8) for name in ("query", "key", "value"))
        q, k = norm(q, f"{layer}.attention.query_norm"), norm(k, f"{layer}.attention.key_norm")
        o = torch_attention(rotate(q, position, BASE), rotate(k, position, BASE), v, visible).flatten(2)
        if output_gate != Gate.none:
            gate = project(y, f"{layer}.attention.output_gate").sigmoid()
            o = o * gate.repeat_interleave(32 // gate.shape[-1], -1)
        x = x + project(o, f"{layer}.attention.output")
        y = norm(x, f"{layer}.ffn_norm")
        y = F.silu(project(y, f"{layer}.ffn.gate")) * project(y, f"{layer}.ffn.up")
        x = x + project(y, f"{layer}.ffn.down")
    assert_close(model(tokens, start, BASE), project(norm(x, "norm"), "head"), rtol=1e-4, atol=1e-4)  # FP32, logits ~10


def test_selecting_every_block_makes_the_sparse_branch_full_attention():
    changes = {"gate": Gate.none, "sinks": False, "tokens": 28}
    model = build("hysparse_no_swa", changes, layers=2)
    full = model.layers[0].attention
    layer = SparseAttention(model_config(), attention_config("hysparse_no_swa", **changes))
    layer.load_state_dict(full.state_dict())
    _, start = batch()
    x, visible, position = torch.randn(2, 26, 16), visible_keys(start), torch.arange(26) - start
    expected, source = full(x, visible, position, BASE, None)
    assert_close(layer(x, visible, position, BASE, source)[0], expected)


@pytest.mark.parametrize("variant", ["hysparse", "hysparse_own_kv", "hysparse_no_swa", "hysparse_shared_swa"])
def test_a_sparse_layer_without_its_source_raises(variant):
    layer, start = SparseAttention(model_config(), attention_config(variant)), torch.zeros(1, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match="full layer"):
        layer(torch.randn(1, 6, 16), visible_keys(start), torch.arange(6) - start, BASE, None)


def test_layer_kinds_follow_the_paper():
    large, small = layer_kinds(49, attention_config(ratio=11)), layer_kinds(36, attention_config(ratio=3))
    assert large == ("F" + "S" * 11) * 4 + "F" and large.count("F") == 5
    assert small == "FSSS" * 8 + "FSSF" and small.count("F") == 10
    assert layer_kinds(5, attention_config(ratio=3)) == "FSSSF"
    assert layer_kinds(5, attention_config(ratio=0)) == "FFFFF"
    assert layer_kinds(6, attention_config(ratio=3, last_full=False)) == "FSSSFS"
    assert layer_kinds(4, attention_config(pattern="FSFS")) == "FSFS"
    with pytest.raises(ConfigError, match="pattern"):
        layer_kinds(5, attention_config(pattern="FSFS"))


@pytest.mark.parametrize("feedforward", FEEDFORWARD)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_of_every_variant_gets_a_gradient(variant, feedforward):
    changes = {"gate": Gate.elementwise} if feedforward == "softmax" and variant != "hybrid_swa" else {}
    model = build(variant, changes, **FEEDFORWARD[feedforward], qk_norm=feedforward == "sigmoid")
    tokens, start = batch()
    logits, auxiliary = model.forward_with_auxiliary(tokens, start, BASE)
    assert logits.shape == (2, 26, 40) and logits.dtype == torch.float32 and auxiliary.shape == ()
    assert (auxiliary > 0) == (feedforward != "dense")
    assert torch.equal(model(tokens, start, BASE), logits)
    (F.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten()) + auxiliary).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [name for name in silent if ".experts." not in name]  # an expert may have got no token


@pytest.mark.parametrize("feedforward", ["dense", "sigmoid"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_document_does_not_see_the_one_before_it(variant, feedforward):
    model = build(variant, **FEEDFORWARD[feedforward])
    tokens, start = batch()
    logits = model(tokens, start, BASE)
    tokens[0, :11] = (tokens[0, :11] + 1 + torch.arange(11)) % 40
    changed = model(tokens, start, BASE)
    assert torch.equal(changed[0, 11:], logits[0, 11:]) and torch.equal(changed[1], logits[1])
    assert not torch.isclose(changed[0, :11], logits[0, :11]).all(-1).any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_document_in_a_row_reads_as_if_it_were_alone(variant):
    """When it begins with a block, since blocks are counted from the start of the row."""
    model = build(variant)
    tokens, start = batch([[0] * 8 + [8] * 15])
    alone = model(tokens[:, 8:], torch.zeros(1, 15, dtype=torch.int64), BASE)
    assert_close(model(tokens, start, BASE)[:, 8:], alone, rtol=1e-4, atol=1e-5)  # FP32; masked sums are longer


@pytest.mark.parametrize("feedforward", ["dense", "sigmoid"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_token_sees_a_later_one(variant, feedforward):
    model = build(variant, **FEEDFORWARD[feedforward])
    tokens, start = batch()
    logits = model(tokens, start, BASE)
    for t in (1, 12, 19, 25):
        later = tokens.clone()
        later[:, t] = (later[:, t] + 7) % 40
        changed = model(later, start, BASE)
        assert torch.equal(changed[:, :t], logits[:, :t])
        assert not torch.isclose(changed[:, t], logits[:, t]).all(-1).any()


@pytest.mark.parametrize("variant", ["hysparse", "hysparse_shared_swa", "hysparse_own_kv"])
def test_only_shared_keys_and_values_carry_gradients_to_the_full_layer(variant):
    """The full layer's own output is cut off, so that what reaches its K and V came from the sparse layers alone."""
    model = build(variant, {"pattern": "FSS"}, layers=3).double()
    full = model.layers[0].attention
    torch.nn.init.zeros_(full.output.weight)
    tokens, start = batch()
    direction = torch.randn(2, 26, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(6))

    def loss():
        return (model(tokens, start, BASE) * direction).sum()

    loss().backward()
    for weight in (full.key.weight, full.value.weight):
        if variant == "hysparse_own_kv":  # nothing but the indices comes from the full layer
            assert weight.grad is None or not weight.grad.any()
            continue
        for entry in ((0, 0), (9, 5)):
            with torch.no_grad():
                ends = []
                for step in (1e-6, -2e-6):
                    weight[entry] += step
                    ends.append(loss())
                weight[entry] += 1e-6
            slope = (ends[0] - ends[1]) / 2e-6
            assert abs(slope) > 1e-3
            assert_close(weight.grad[entry], slope, rtol=1e-5, atol=1e-6)


def test_every_sparse_layer_adds_to_the_gradient_of_the_shared_keys_and_values():
    """Cutting the output of one sparse layer after the other changes the gradient each time."""
    tokens, start = batch()
    gradients = []
    for cut in ((), (1,), (1, 2), (1, 2, 3)):
        model = build("hysparse", {"pattern": "FSSS"})
        for i in (0, *cut):
            torch.nn.init.zeros_(model.layers[i].attention.output.weight)
        model(tokens, start, BASE).logsumexp(-1).sum().backward()
        gradients.append(model.layers[0].attention.value.weight.grad.norm().item())
    assert len(set(gradients)) == 4 and min(gradients[:3]) > 0 and gradients[3] == 0


def test_parameters_are_named_and_shaped_as_documented():
    moe = MoEConfig(experts=2, active=1, ffn=12)
    gates = {"gate": Gate.elementwise, "output_gate": Gate.headwise, "pattern": "FSF"}
    state = build("hysparse", gates, layers=3, moe=moe, qk_norm=True).state_dict()
    layer = {"attention_norm.weight": (16,), "ffn_norm.weight": (16,)}
    layer |= {"attention.query.weight": (32, 16), "attention.output.weight": (16, 32)}
    layer |= {"attention.key.weight": (16, 16), "attention.value.weight": (16, 16)}
    layer |= {"attention.query_norm.weight": (8,), "attention.key_norm.weight": (8,)}
    layer |= {"ffn.router.weight": (2, 16), "ffn.expert_bias": (2,)}
    for e in range(2):
        layer |= {f"ffn.experts.{e}.{part}.weight": (12, 16) for part in ("gate", "up")}
        layer |= {f"ffn.experts.{e}.down.weight": (16, 12)}
    full = layer | {"attention.output_gate.weight": (4, 16)}
    sparse = layer | {f"attention.{branch}_gate.weight": (32, 16) for branch in ("sparse", "window")}
    sparse |= {f"attention.{branch}_sink": (4,) for branch in ("sparse", "window")}
    expected = {"embedding.weight": (40, 16), "norm.weight": (16,), "head.weight": (40, 16)}
    for i, kind in enumerate((full, sparse, full)):
        expected |= {f"layers.{i}.{name}": shape for name, shape in kind.items()}
    assert {name: tuple(value.shape) for name, value in state.items()} == expected

    shared = build("hysparse_shared_swa", qk_norm=True).layers[1].attention.state_dict()
    assert not {"key.weight", "value.weight", "key_norm.weight"} & set(shared) and "query_norm.weight" in shared


def test_matrices_that_write_to_the_residual_stream_start_smaller():
    torch.manual_seed(7)
    model = PlainModel(model_config(hidden=128, ffn=256, init_std=0.02), attention_config())
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            assert weight.eq(0 if "sink" in name else 1).all()
        elif weight.numel() > 4000:
            expected = 0.02 / math.sqrt(8) if name.endswith(("attention.output.weight", "ffn.down.weight")) else 0.02
            assert_close(weight.std().item(), expected, rtol=0.06, atol=0)  # thousands of samples
