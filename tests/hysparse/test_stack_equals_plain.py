"""The Megatron layers and the single-file model are two readings of the paper; they must agree."""

import pytest
import torch
from torch.testing import assert_close

from hysparse.choices import Balance, Gate, Kernels, Recompute, RouterScore
from hysparse.config import MoEConfig
from hysparse.plain import PlainModel
from hysparse.plain_weights import to_plain
from kernels import reference
from tests.models import ROPE_BASE, VARIANTS, build_model, packed_batch, small_config

pytestmark = pytest.mark.usefixtures("megatron")

# FP32 sums in another order, through five layers; gradients relative to the largest entry of their tensor
LOGITS = {"rtol": 1e-5, "atol": 1e-5}
GRADIENTS = 1e-5


def megatron_gradients(config, batches, order="interleaved"):
    """Logits of each batch, and the gradients of the summed losses under the names of the plain model.

    "interleaved" runs F1 F2 B1 B2 as a pipeline does: what one forward left behind must not leak into another.
    """
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    model = build_model(config).train()
    logits = []

    def forward(batch):
        logits.append(model(batch["tokens"], batch["document_start"], ROPE_BASE))
        return weighted_loss(logits[-1], batch)

    if order == "interleaved":
        for loss in [forward(batch) for batch in batches]:
            loss.backward()
    else:
        for batch in batches:
            forward(batch).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    plain = PlainModel(config.model, config.attention)
    missing = plain.load_state_dict(to_plain(dict(model.state_dict()), config.model, config.attention), strict=False)
    assert not missing.unexpected_keys and not [key for key in missing.missing_keys if "expert_bias" not in key]
    return logits, to_plain(gradients, config.model, config.attention), plain


def weighted_loss(logits, batch):
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten(), reduction="none")
    return (loss * batch["loss_mask"].flatten()).sum()


def compare(config, batches, order="interleaved"):
    logits, gradients, plain = megatron_gradients(config, batches, order)
    tokens = batches[0]["tokens"].numel()
    for batch, ours in zip(batches, logits, strict=True):
        theirs, auxiliary = plain.forward_with_auxiliary(batch["tokens"], batch["document_start"], ROPE_BASE)
        assert_close(ours, theirs, **LOGITS)
        # Megatron's loss is a sum over tokens here, and it scales the balance loss to match
        (weighted_loss(theirs, batch) + auxiliary * tokens).backward()
    for name, parameter in plain.named_parameters():
        expected = parameter.grad
        error = (gradients[name] - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
        assert error < GRADIENTS, f"{name}: relative error {error:.1e}"
    assert gradients.keys() == {name for name, _ in plain.named_parameters()}


@pytest.mark.parametrize("recompute", list(Recompute))
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_of_every_variant_equal_the_plain_model(variant, moe, recompute):
    config = small_config(variant, moe, recompute=recompute)
    compare(config, [packed_batch(config, seed=0), packed_batch(config, seed=1)])


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("variant", ["hysparse", "hysparse_shared_swa"])
def test_some_layers_recomputed_in_full_and_the_others_selectively_equal_the_plain_model(variant, layers):
    config = small_config(variant, recompute=Recompute.full, recompute_layers=layers)
    compare(config, [packed_batch(config, seed=0), packed_batch(config, seed=1)])


def test_the_first_layers_of_a_chunk_run_again_and_the_others_do_not():
    runs = []
    config = small_config(recompute=Recompute.full, recompute_layers=2)
    model = build_model(config).train()
    for layer in model.decoder.layers:
        layer.pre_mlp_layernorm.register_forward_hook(lambda *_, number=layer.layer_number: runs.append(number))
    batch = packed_batch(config)
    weighted_loss(model(batch["tokens"], batch["document_start"], ROPE_BASE), batch).backward()
    assert runs == [1, 2, 3, 4, 5, 2, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels take no FP32")
@pytest.mark.parametrize(
    "variant, recompute",
    [("hysparse", Recompute.none), ("hysparse", Recompute.selective), ("hysparse", Recompute.full)]
    + [(variant, Recompute.none) for variant in VARIANTS if variant != "hysparse"],
)
def test_the_triton_operators_in_the_stack_equal_the_plain_model(variant, recompute):
    """Through Triton's interpreter."""
    config = small_config(variant, moe=False, layers=4, ratio=2, recompute=recompute)
    config.kernels, config.attention.block, config.attention.tokens = Kernels.triton, 16, 32
    compare(config, [packed_batch(config, rows=1)])


@pytest.mark.parametrize("gate", list(Gate))
def test_gates_of_every_granularity_and_qk_norm_equal_the_plain_model(gate):
    config = small_config()
    config.attention.gate, config.model.qk_norm = gate, True
    compare(config, [packed_batch(config)])


def test_a_softmax_router_with_balance_and_z_loss_equals_the_plain_model():
    config = small_config()
    config.model.moe.score, config.model.moe.bias_update_rate, config.model.moe.z_loss = RouterScore.softmax, 0, 0.01
    compare(config, [packed_batch(config)])


def test_dense_layers_before_the_experts_equal_the_plain_model():
    config = small_config()
    config.model.moe.first_dense_layers = 2
    compare(config, [packed_batch(config)])


@pytest.mark.parametrize("score", list(RouterScore))
def test_grouped_routing_a_shared_expert_and_balance_of_the_batch_equal_the_plain_model(score):
    config = small_config()
    rate = 1e-3 if score is RouterScore.sigmoid else 0
    config.model.moe = MoEConfig(
        experts=8, active=4, ffn=32, groups=4, active_groups=2, shared_ffn=24, balance=Balance.batch, aux_loss=0.05,
        score=score, bias_update_rate=rate,
    )  # fmt: skip
    compare(config, [packed_batch(config, seed=0), packed_batch(config, seed=1)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels take no FP32")
def test_the_triton_operators_of_the_experts_in_the_stack_equal_the_plain_model():
    config = small_config(layers=2, ratio=1)
    config.kernels, config.attention.block, config.attention.tokens = Kernels.triton, 16, 32
    compare(config, [packed_batch(config)])


def test_f1_f2_b1_b2_gives_the_gradients_of_f1_b1_f2_b2():
    config = small_config(recompute=Recompute.full)
    batches = [packed_batch(config, seed=0), packed_batch(config, seed=1)]
    _, interleaved, _ = megatron_gradients(config, batches)
    _, one_by_one, _ = megatron_gradients(config, batches, order="one by one")
    for name, gradient in interleaved.items():
        assert_close(gradient, one_by_one[name], rtol=0, atol=0, msg=name)


def test_a_recomputed_full_layer_selects_only_once(monkeypatch):
    calls = []
    selecting = reference.scored_attention
    monkeypatch.setattr(reference, "scored_attention", lambda *inputs: calls.append(1) or selecting(*inputs))
    config = small_config(recompute=Recompute.full)  # FSSSF: the last layer has no readers
    compare(config, [packed_batch(config)])
    assert len(calls) == 1


def test_a_sparse_layer_without_its_full_layer_is_an_error():
    config = small_config()
    model = build_model(config, layers=range(1, 5))
    batch = packed_batch(config)
    with pytest.raises(RuntimeError, match="sparse layer"):
        model(batch["tokens"], batch["document_start"], ROPE_BASE)
