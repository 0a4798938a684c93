"""Expert parallelism beyond equal losses: ranks without a token, and checkpoints there and back."""

from pathlib import Path

import torch

from hysparse.choices import Balance, Dispatcher
from hysparse.config import MoEConfig
from parallel import checkpoint
from parallel.start import stop
from tests.conftest import run_processes
from tests.models import small_config
from tests.parallel.layouts import FOUR_BLOCKS, make_engine, one_rank, train
from tests.parallel.test_layouts import assert_same

STEPS = 3


def starved(expert: int) -> list[float]:
    """Losses and gradient norms where the bias sends every token to the first two of four experts, which are full."""
    config = small_config(**FOUR_BLOCKS, expert=expert)
    config.model.moe.bias_update_rate, config.model.moe.capacity_factor = 1e-3, 1.5
    engine = make_engine(config)
    for layer in engine.modules[0].decoder.layers:
        layer.mlp.router.expert_bias[:2] = 10.0
    results = train(engine, config, 2)
    load = torch.stack([layer.mlp.router.load for layer in engine.modules[0].decoder.layers])
    assert load[:, :2].all() and not load[:, 2:].any()
    for layer in engine.modules[0].decoder.layers:  # 64 rows want to go where there is room for 48
        assert layer.mlp.router.dropped == load[0].sum() // 4
    stop()
    return results


def load_and_save(expert: int, source: Path, target: Path) -> None:
    """A checkpoint written by one layout, as another one writes it."""
    engine = make_engine(small_config(**FOUR_BLOCKS, expert=expert))
    engine.load_state(checkpoint.load(source, lambda: engine.state(is_loading=True)))
    checkpoint.save(target, STEPS, engine.state(), {})
    stop()


def continued(source: Path) -> list:
    config = small_config(**FOUR_BLOCKS)
    engine = make_engine(config)
    engine.load_state(checkpoint.load(source, lambda: engine.state(is_loading=True)))
    results = train(engine, config, STEPS)
    stop()
    return results


def with_everything(expert: int) -> list:
    """A shared expert, groups, and the balance of the whole batch, in one micro-batch over all ranks."""
    config = small_config(**FOUR_BLOCKS, expert=expert)
    config.model.moe = MoEConfig(
        experts=4, active=2, ffn=32, groups=2, active_groups=2, shared_ffn=24, balance=Balance.batch, aux_loss=0.05
    )
    config.phases["only"].micro_batch = 4 // expert
    engine = make_engine(config)
    results = train(engine, config, 2)
    stop()
    return results


def deepep(expert: int) -> list:
    """Through DeepEP's dispatcher, with what the package does done by collectives of torch."""
    from megatron.core.transformer.moe import token_dispatcher
    from torch.distributed.nn.functional import all_gather, all_reduce

    def dispatch(x, experts, weights, number, group, **unused):
        local, rank = number // group.size(), group.rank()
        x, experts, weights = (torch.cat(all_gather(part, group)) for part in (x, experts, weights))
        here = experts // local == rank
        arriving = here.any(1).nonzero().flatten()
        chosen = torch.where(here, experts - rank * local, -1)[arriving]
        counts = chosen[chosen >= 0].bincount(minlength=local)
        return x[arriving], chosen, (weights * here)[arriving], counts, (arriving, len(x))

    def combine(x, group, handle, **unused):
        arriving, tokens = handle
        whole = all_reduce(x.new_zeros(tokens, x.shape[1]).index_add(0, arriving, x), group=group)
        return whole.chunk(group.size())[group.rank()], None

    token_dispatcher.fused_dispatch, token_dispatcher.fused_combine = dispatch, combine
    token_dispatcher.set_deepep_num_sms = lambda number: None
    config = small_config(**FOUR_BLOCKS, expert=expert)
    config.parallel.dispatcher = Dispatcher.deepep if expert > 1 else Dispatcher.alltoall
    engine = make_engine(config)
    results = train(engine, config, STEPS)
    stop()
    return results


def test_tokens_that_travel_once_to_each_rank_train_the_same_model():
    [expected] = run_processes(deepep, 1, 1)
    for found in run_processes(deepep, 2, 2):
        assert_same(found, expected)


def test_one_expert_a_rank_a_shared_expert_and_the_balance_of_all_ranks_equal_one_rank():
    [expected] = run_processes(with_everything, 1, 1)
    for found in run_processes(with_everything, 4, 4):
        assert_same(found, expected)


def test_a_rank_whose_experts_get_no_token_trains_on_while_the_other_one_drops_some():
    """Rank 1 holds the experts that nobody chooses."""
    [expected] = run_processes(starved, 1, 1)
    for found in run_processes(starved, 2, 2):
        assert_same(found, expected)


def test_a_checkpoint_goes_from_one_rank_to_two_and_four_with_fewer_experts_each_and_back_bit_by_bit(tmp_path):
    [(_, expected)] = run_processes(one_rank, 1, tmp_path / "one", STEPS)
    name = f"step-{STEPS:08d}"
    run_processes(load_and_save, 2, 2, tmp_path / "one" / name, tmp_path / "two")
    run_processes(load_and_save, 4, 4, tmp_path / "two" / name, tmp_path / "four")
    [found] = run_processes(continued, 1, tmp_path / "four" / name)
    assert found == expected
