"""DeepSpeed's ZeRO trains the model that Megatron trains, step for step, and goes on from its checkpoints."""

import os
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from hysparse.choices import EngineName, Offload, Recompute
from hysparse.config import DeepSpeedConfig
from hysparse.estimate import PINNED, offloaded
from hysparse.plan import Plan
from parallel.engines import Zero, make_engine
from parallel.start import StartError
from tests.conftest import run_processes
from tests.models import small_config
from tests.parallel.zero import ENGINES, MEGATRON, side_by_side, switched, values_on_the_host

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="the package deepspeed is not installed")
OTHERS = [name for name in ENGINES if name != MEGATRON]


def assert_same(steps: list, expected: list) -> None:
    """FP32 sums in another order; after 20 steps the relative difference is some 1e-7."""
    assert [step.tokens for step in steps] == [step.tokens for step in expected]
    assert [step.loss for step in steps] == pytest.approx([step.loss for step in expected], rel=1e-5)
    norms = [step.gradient_norm for step in expected]
    assert [step.gradient_norm for step in steps] == pytest.approx(norms, rel=1e-5)


@pytest.fixture(scope="module")
def two_ranks() -> dict:
    return run_processes(side_by_side, 2, list(ENGINES), 20)[0]


@pytest.mark.parametrize("name", OTHERS)
def test_twenty_steps_on_two_ranks_are_those_of_megatron(name, two_ranks):
    steps, evaluation, _ = two_ranks[name]
    expected, expected_evaluation, _ = two_ranks[MEGATRON]
    assert len(steps) == 20
    assert max(step.gradient_norm for step in steps) > 1  # some were clipped
    assert_same(steps, expected)
    assert evaluation == [pytest.approx(position, rel=1e-5) for position in expected_evaluation]


def test_zero_3_leaves_no_weights_on_a_rank_between_steps(two_ranks):
    assert {name: weights == 0 for name, (_, _, weights) in two_ranks.items()} == {
        name: settings.get("zero") == 3 for name, settings in ENGINES.items()
    }


@pytest.mark.parametrize("recompute", [Recompute.selective, Recompute.full])
def test_gradients_of_shared_keys_and_values_survive_zero_3_with_recomputation(recompute, two_ranks):
    recomputed = run_processes(side_by_side, 2, ["ZeRO 3"], 6, recompute)[0]
    assert_same(recomputed["ZeRO 3"][0], two_ranks[MEGATRON][0][:6])


def test_a_checkpoint_of_one_engine_goes_on_under_the_other_and_under_another_stage(tmp_path):
    stages = ("ZeRO 1", "ZeRO 2", "ZeRO 3, all on the CPU")
    same, there = [(name, name) for name in stages], [(MEGATRON, name) for name in stages]
    back, across = [(name, MEGATRON) for name in stages], [("ZeRO 3, all on the CPU", "ZeRO 2")]
    results = run_processes(switched, 2, same + there + back + across, tmp_path, {})[0]
    for writer, reader in same:
        assert results[writer, reader] == results[writer]  # bit for bit
    for writer, reader in there + back + across:
        assert_same(results[writer, reader], results[writer])


@pytest.mark.parametrize("name", [name for name, settings in ENGINES.items() if "offload_optimizer" in settings])
def test_an_optimizer_on_the_cpu_takes_as_much_host_memory_as_the_planner_says(name):
    ranks = run_processes(values_on_the_host, 2, name)
    plain, pinned, bf16 = (sum(rank[kind] for rank in ranks) for kind in ("plain", "pinned", "bf16"))
    config = small_config()
    config.engine = EngineName.deepspeed
    zero, *places = ENGINES[name]
    config.deepspeed = DeepSpeedConfig(zero=ENGINES[name][zero], **{key: Offload.cpu for key in places})
    share, each = offloaded(config)
    assert share == 1
    # Under ZeRO 2 both ranks keep the gradient of a weight that lies on the boundary between them
    expected = each * Plan(config.model, config.attention).parameters()
    assert 4 * plain + PINNED * (4 * pinned + 2 * bf16) == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif("TEST_NVME" not in os.environ, reason="compiles for minutes; TEST_NVME=1 asks for it")
def test_parameters_and_optimizer_on_nvme_train_save_and_load_as_in_memory(tmp_path):
    nvme = {"offload_optimizer": "nvme", "offload_parameters": "nvme", "nvme": str(tmp_path / "nvme")}
    pairs = [("ZeRO 3", MEGATRON), (MEGATRON, "ZeRO 3"), ("ZeRO 3", "ZeRO 3")]
    results = run_processes(switched, 2, pairs, tmp_path, nvme)[0]
    for writer, reader in pairs:
        assert_same(results[writer, reader], results[MEGATRON])


def test_nvme_where_its_operator_cannot_be_compiled_is_refused_with_what_to_install(monkeypatch):
    for name in ("DS_ACCELERATOR", "LOCAL_RANK"):  # set by the engine, and put back after the test
        monkeypatch.setenv(name, "")
    builder = SimpleNamespace(AsyncIOBuilder=lambda: SimpleNamespace(is_compatible=lambda verbose: False))
    for name, module in {
        "deepspeed": SimpleNamespace(ops=SimpleNamespace()),
        "deepspeed.ops": SimpleNamespace(),
        "deepspeed.ops.op_builder": builder,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    zero = Zero(zero=3, offload_optimizer="nvme", nvme="/disk")
    with pytest.raises(StartError, match="cannot be compiled here; install libaio-dev, ninja and a C.. compiler, or"):
        make_engine("deepspeed", zero, None, None, None, None, torch.device("cpu"))
