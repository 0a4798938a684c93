"""What the engine promises beside equal losses under all layouts: who decays, and that looking changes nothing."""

import pytest
import torch

from parallel import checkpoint
from tests.models import ROPE_BASE, packed_batch, small_config


def make_engine(device: torch.device, moe: bool, bf16: bool = False, offload: float = 0.0):
    """An engine of one rank on the process groups of the session."""
    from hysparse.model import transformer_config
    from hysparse.trainer import forward
    from parallel.engines import AdamW
    from parallel.megatron_engine import MegatronEngine
    from tests.models import build_model

    config = small_config(moe=moe)

    def build(transformer, pre, post, vp_stage):
        return build_model(config, pre=pre, post=post, transformer=transformer)

    adamw = AdamW(0.9, 0.95, 1e-10, 0.1, 1.0)
    transformer = transformer_config(config, [], bf16)
    return MegatronEngine(transformer, build, forward, adamw, device, offload=offload)


@pytest.fixture
def engine(megatron):
    return make_engine(megatron, moe=True)


def weights(engine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.modules[0].state_dict().items() if torch.is_tensor(tensor)}


def test_norms_and_sinks_do_not_decay_and_everything_else_does(megatron):
    engine = make_engine(megatron, moe=False)
    batch = packed_batch(small_config())
    batch["loss_mask"].zero_()  # no gradient: only weight decay moves a weight
    before = weights(engine)
    engine.step([batch], 0.5, rope_base=ROPE_BASE)
    for name, after in weights(engine).items():
        factor = 1.0 if name.endswith(("norm.weight", "_sink")) else 1 - 0.5 * 0.1
        torch.testing.assert_close(after, before[name] * factor, msg=name)


def test_evaluation_changes_no_state_and_its_loss_by_position_adds_up(engine):
    batches = [packed_batch(small_config(), seed=seed) for seed in (0, 1)]
    before = weights(engine)
    totals = engine.evaluate(batches, buckets=8, rope_base=ROPE_BASE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(engine).items())
    assert totals[:, 1].sum() == sum(batch["loss_mask"].sum() for batch in batches)
    loss = (totals[:, 0].sum() / totals[:, 1].sum()).item()
    # the same weights and tokens in training mode; FP32 sums in another order
    assert engine.step(batches, 0.0, rope_base=ROPE_BASE).loss == pytest.approx(loss, rel=1e-5)


def test_the_expert_bias_moves_towards_balance_and_is_part_of_the_checkpoint(engine):
    engine.step([packed_batch(small_config())], 0.0, rope_base=ROPE_BASE)
    biases = {name: tensor for name, tensor in weights(engine).items() if name.endswith("expert_bias")}
    assert len(biases) == 5 and all(bias.abs().max() <= 1.001e-3 for bias in biases.values())
    assert any(bias.abs().sum() > 0 for bias in biases.values())
    assert biases.keys() <= engine.state()["model0"].keys()


def test_the_step_count_of_a_checkpoint_is_that_of_its_first_optimizer(engine, tmp_path):
    """Where the first rank has no experts, Transformer Engine's Adam leaves the second optimizer without one."""

    def train() -> list[float]:
        return [
            engine.step([packed_batch(small_config(), seed=seed)], 1e-2, rope_base=ROPE_BASE).loss for seed in (2, 3)
        ]

    train()
    path = checkpoint.save(tmp_path, 2, engine.state(), {})
    expected = train()
    state = checkpoint.load(path, lambda: engine.state(is_loading=True))
    for group in state["optimizer"][1]["optimizer"]["param_groups"]:
        del group["step"]
    engine.load_state(state)
    assert train() == expected
