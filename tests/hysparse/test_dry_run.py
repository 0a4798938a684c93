"""A dry run says of whole clusters that they fit together, in seconds on this machine, and notices when they do not."""

import re
from functools import partial

import pytest

from hysparse.config import ParallelConfig
from tests.conftest import run_processes
from tests.forks import Fork
from tests.models import small_config


def dry_run_of(*arguments: str) -> str:
    """What `python train.py` prints, in a process of its own: a fake world does not leave it."""
    process = Fork(arguments)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-2000:]
    return output


@pytest.mark.slow
def test_the_80b_fits_together_on_512_ranks():
    """81,351,355,904 weights: 49 layers of 512 experts, counted by hand from table 1 in tests/hysparse/test_plan.py."""
    shown = dry_run_of("+experiment=moe80b_1to11", "dry_run=512")
    assert "Dry run of 512 ranks: all is well" in shown
    assert "81,351,355,904 on 32 kinds of rank" in shown
    assert re.search(r"pretrain +256 +16 +16 +1 +8,388,608 +59,605", shown)
    ranks = re.search(r"Ranks built.*\n.*\n(.*\n.*\n.*)\n", shown)[1].split("\n")
    assert [line.split()[:6] for line in ranks] == [
        ["0", "0", "0", "0", "0", "0"],
        ["256", "1", "0", "0", "0", "0"],
        ["511", "1", "3", "15", "7", "3"],
    ]


@pytest.mark.slow
def test_the_7b_fits_together_on_64_ranks_with_two_chunks_a_stage():
    shown = dry_run_of("+experiment=dense7b_1to3", "dry_run=64", "parallel.pipeline=2", "parallel.virtual=2")
    assert "Dry run of 64 ranks: all is well" in shown
    assert "7,629,215,360 on 8 kinds of rank" in shown


def small_dry_run(damage: str, tensor: int = 2, **settings) -> str:
    """The report of the small model on 16 ranks after `damage` was done to the code, or what it raised."""
    from hysparse import dry_run, experts, stack

    config = small_config(layers=8, ratio=2, tensor=tensor, pipeline=2, virtual=2, expert=4)
    for name, value in settings.items():
        setattr(config, name, value)
    config.dry_run, config.phases["only"].global_batch = 16, 32
    if damage == "layers numbered within the stage":
        stack.replace_prefix_for_sharding = lambda state, here, name: None
    if damage == "experts described as on one rank":
        described = experts.ShardedTensor.from_rank_offsets

        class Describe:
            from_rank_offsets = staticmethod(lambda name, weight, *where, **more: described(name, weight, **more))

        experts.ShardedTensor = Describe
    try:
        return dry_run.dry_run(config)
    except dry_run.DryRunError as error:
        return str(error)


def test_every_part_of_a_small_model_is_found_on_16_ranks():
    [shown] = run_processes(small_dry_run, 1, "")
    assert "Dry run of 16 ranks: all is well" in shown
    assert "operators as in kernels.reference" in shown  # its head dimension is none that the Triton operators take


def test_context_parallel_ranks_hold_the_same_weights_and_run_their_part_of_the_sequence():
    layout = ParallelConfig(tensor=2, context=2, expert=4)
    [shown] = run_processes(partial(small_dry_run, parallel=layout), 1, "")
    assert "Dry run of 16 ranks: all is well" in shown and "on 4 kinds of rank" in shown
    assert re.search(r"only +32 +4 +8 +1 +2,048", shown)  # 8 sequences of 64 tokens for each of four data ranks


def test_a_kv_head_that_two_ranks_share_is_found_once():
    [shown] = run_processes(small_dry_run, 1, "", 4)
    assert "Dry run of 16 ranks: all is well" in shown and "2 tensor-parallel ranks share a KV head" in shown


@pytest.mark.parametrize(
    "damage, message",
    [
        ("layers numbered within the stage", "a rank has 41,480 weights, and 31,976 in its checkpoint"),
        ("experts described as on one rank", "experts.* is written twice"),
    ],
)
def test_a_wrong_map_of_shards_is_found(damage, message):
    [shown] = run_processes(small_dry_run, 1, damage)
    assert re.search(message, shown), shown


def test_shards_that_leave_a_gap_overlap_or_lie_outside_are_named():
    from hysparse.dry_run import DryRunError, Held, Shard, check_cover

    def held(*rows: range) -> Held:
        shards = [Shard("w", (row.start, 0), (len(row), 3)) for row in rows]
        return Held({"w": (4, 3)}, set(shards), shards, 0, set())

    assert check_cover([held(range(2)), held(range(2, 4))]) == 12
    for rows, message in [
        ([range(2)], "6 of 12 values are written"),
        ([range(3), range(2, 4)], r"lies at \(2, 0\) .* is written twice"),
        ([range(2), range(2, 5)], "lies outside"),
    ]:
        with pytest.raises(DryRunError, match=message):
            check_cover([held(*rows)])
