"""HySparse adds no communication under tensor parallelism: the collectives of a training step, counted in torch."""

import os
from collections import Counter

import pytest
from torch.profiler import ProfilerActivity, profile

from hysparse.choices import Recompute
from parallel.start import stop
from tests.conftest import run_processes
from tests.models import small_config
from tests.parallel.layouts import FOUR_BLOCKS, make_engine, train

ORACLES = 2  # of FSS FSS F F
SIZES = (2, 4)  # KV heads on ranks of their own; a KV head shared by two ranks


def collectives(cases: list[tuple[str, int, Recompute]]) -> list[dict[str, int]]:
    """By name, in a step of one micro-batch: of each attention variant and tensor-parallel size."""
    first_port, counts = int(os.environ["MASTER_PORT"]), []
    for index, (variant, tensor, recompute) in enumerate(cases):
        os.environ["MASTER_PORT"] = str(first_port + index)  # the old one may still be closing
        sizes = FOUR_BLOCKS if variant == "hysparse" else {"layers": 8, "ratio": 0}
        config = small_config(variant, **sizes, tensor=tensor, recompute=recompute)
        config.phases["only"].micro_batch = 4 // (4 // tensor)
        engine = make_engine(config)
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            train(engine, config, 1)
        names = (event.name() for event in recorded.profiler.kineto_results.events())  # .events() takes seconds
        counts.append(dict(Counter(name for name in names if name.startswith("c10d::"))))
        stop()
    return counts


@pytest.fixture(scope="module")
def counted() -> dict[tuple, dict[str, int]]:
    cases = [(variant, size, how) for size in SIZES for how in ("none", "full") for variant in ("hysparse", "full")]
    every = run_processes(collectives, 4, [(variant, size, Recompute(how)) for variant, size, how in cases])
    assert all(counts == every[0] for counts in every)
    return dict(zip(cases, every[0], strict=True))


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_with_as_many_kv_heads_as_ranks_it_is_the_full_attention_twin_call_by_call(counted, recompute):
    assert counted["hysparse", 2, recompute] == counted["full", 2, recompute]
    assert sum(counted["hysparse", 2, recompute].values()) > 8 * 4  # a gather and a scatter a layer, there and back


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_ranks_that_share_a_kv_head_agree_on_its_blocks_once_a_hybrid_block(counted, recompute):
    ours, twin = Counter(counted["hysparse", 4, recompute]), Counter(counted["full", 4, recompute])
    assert ours - twin == Counter({"c10d::allreduce_": ORACLES}) and not twin - ours
