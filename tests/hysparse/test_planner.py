"""The planner proposes layouts that train.py accepts, that fit, and the quickest of them first."""

import re
import runpy
import shlex
from dataclasses import fields, replace

import pytest
from hydra import compose, initialize_config_dir

from hysparse import planner
from hysparse.choices import Dispatcher, EngineName, Recompute
from hysparse.compose import CONF, register, resolve
from hysparse.config import ConfigError
from hysparse.estimate import Cluster
from hysparse.layouts import NothingFits, choices, overfull, overrides
from tests.models import small_config

GIB = 2**30


def resolved(*arguments: str):
    register()
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return resolve(compose("config", list(arguments)))


@pytest.mark.parametrize(
    "arguments",
    ["+experiment=moe80b_1to11 gpus=512 memory=141GiB", "+experiment=dense7b_1to3 gpus=64 parallel.tensor=2"],
)
def test_the_command_that_it_prints_is_accepted_for_that_many_ranks(arguments, capsys):
    planner.main(arguments.split())
    *_, command = capsys.readouterr().out.strip().split("\n")
    words = shlex.split(command)
    assert words[:2] == ["python", "train.py"] and len(words) == len({word.partition("=")[0] for word in words})
    ranks = re.search(r"gpus=(\d+)", arguments)[1]
    config = resolved(*words[2:], f"dry_run={ranks}")
    assert config.parallel.tensor == 2 or "parallel.tensor" not in arguments


def test_its_command_is_parallel_plan(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["plan.py", "--help"])
    runpy.run_module("parallel.plan", run_name="__main__")
    assert "python -m parallel.plan +experiment=NAME gpus=N" in capsys.readouterr().out


def test_the_command_that_it_prints_is_quoted_for_a_shell(capsys):
    planner.main(["+experiment=tiny", "gpus=2", "data.path=null", blend := "+data.blend={a: 0.7, b: 0.3}"])
    assert blend in shlex.split(capsys.readouterr().out.strip().split("\n")[-1])


def test_a_dispatcher_that_needs_experts_on_other_ranks_gets_them(monkeypatch):
    monkeypatch.setattr("hysparse.layout_checks.find_spec", lambda name: name)  # as if deep_ep were installed
    config = small_config(layers=8, ratio=2, dispatcher=Dispatcher.deepep)
    assert {choice.config.parallel.expert for choice in choices(config, Cluster(4), [])} == {2, 4}


def test_all_that_is_proposed_fits_and_the_first_is_the_quickest():
    config = small_config(layers=8, ratio=2)
    config.phases["only"].global_batch = 64
    found = choices(config, Cluster(8), [])
    assert found[0].days == min(choice.days for choice in found)
    assert all(choice.memory.total <= 80 * GIB for choice in found)
    sizes = {tuple(overrides(choice)[:-1]) for choice in found}
    assert len(sizes) == len(found) > 50
    # what no layout of this model on eight ranks can be: FSS FSS F F has four blocks, four query heads, four experts
    for choice in found:
        parallel = choice.config.parallel
        assert parallel.tensor <= 4 and parallel.pipeline * parallel.virtual <= 4 and parallel.expert <= 4
        assert parallel.virtual == 1 or parallel.pipeline > 1
        assert parallel.context == 1  # sequences of 64 tokens


def test_long_sequences_are_split_and_never_into_too_little():
    config = small_config(context=1)
    config.phases["only"].sequence_length, config.phases["only"].global_batch = 16384, 8
    sizes = {choice.config.parallel.context for choice in choices(config, Cluster(8), [])}
    assert sizes == {1, 2, 4}  # 4,096 tokens a rank at least
    assert {c.config.parallel.context for c in choices(config, Cluster(8), ["parallel.context"])} == {1}


def test_what_was_given_stays():
    config = small_config(layers=8, ratio=2, tensor=2, recompute=Recompute.selective)
    found = choices(config, Cluster(8), ["parallel.tensor", "parallel.recompute", "phases.only.micro_batch"])
    assert {choice.config.parallel.tensor for choice in found} == {2}
    assert {choice.config.parallel.recompute for choice in found} == {Recompute.selective}
    assert {choice.config.phases["only"].micro_batch for choice in found} == {1}


def test_a_number_of_recomputed_layers_stays_and_shows_in_the_table():
    config = small_config(layers=8, ratio=2, recompute=Recompute.full, recompute_layers=2)
    cluster = Cluster(8)
    found = choices(config, cluster, [])
    assert {(c.config.parallel.recompute, c.config.parallel.recompute_layers) for c in found} == {(Recompute.full, 2)}
    assert "full (2)" in planner.report(found, cluster, [])


def test_too_little_memory_names_the_smallest_estimate():
    config = small_config(layers=8, ratio=2)
    config.phases["long"] = replace(config.phases["only"], sequence_length=65536)  # another layout needs least
    with pytest.raises(NothingFits) as error:
        choices(config, Cluster(8, memory=GIB), [])
    smallest = error.value.smallest
    assert choices(config, Cluster(8, memory=smallest), [])
    with pytest.raises(NothingFits):
        choices(config, Cluster(8, memory=smallest - 1), [])


def test_layouts_that_exceed_the_host_memory_of_a_node_are_left_out_and_too_little_names_the_smallest():
    config = small_config(offload_optimizer=1.0)
    found = choices(config, Cluster(8, node=4), [])
    sizes = sorted({choice.host.total for choice in found})
    limit = sizes[len(sizes) // 2]
    assert choices(config, Cluster(8, node=4, host_memory=limit), []) == [
        choice for choice in found if choice.host.total <= limit
    ]
    with pytest.raises(NothingFits) as error:
        choices(config, Cluster(8, node=4, host_memory=sizes[0] - 1), [])
    assert error.value.host.total == sizes[0]


def test_too_little_host_memory_is_answered_with_a_share_that_fits(capsys):
    given = "+experiment=dense7b_1to3 gpus=8 memory=141GiB host_memory=250GiB".split()
    with pytest.raises(SystemExit):
        planner.main([*given, "parallel.offload_optimizer=1"])
    share = re.search(r"or (parallel.offload_optimizer=0\.\d+)$", capsys.readouterr().err)[1]
    planner.main([*given, share])
    assert "8 in a node with 250 GiB of host memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("+experiment=tiny", "gpus is missing: give the number of GPUs, for example gpus=512"),
        ("+experiment=tiny gpus=0", "gpus=0 is no size; write for example gpus=8"),
        ("+experiment=tiny gpus=1.5", "gpus=1.5 is no size"),
        ("+experiment=tiny gpus=8 memory=lots", "memory=lots is no size; write for example memory=141GiB"),
        ("+experiment=tiny gpus=8 model.layer=3", "model.layer is no key of the configuration"),
        ("+experiment=tiny gpus=1021", "gpus=1021: no layout of tiny is valid"),
        ("+experiment=tiny gpus=8 parallel.pipeline=auto", "chosen by the planner anyway; leave out auto"),
        ("+experiment=tiny gpus=8 parallel.pipeline=2 parallel.layout=[1,2]", "balanced by the planner; leave it out"),
        ("+experiment=tiny gpus=8 attention.ratio=-1", "attention.ratio=-1 must be 0"),
        (
            "+experiment=moe80b_1to11 gpus=8",
            r"memory=80GiB: no layout of moe80b fits on gpus=8; the smallest .*memory=1..GiB",
        ),
        (
            "+experiment=dense7b_1to3 gpus=8 host_memory=50GiB",
            r"host_memory=50GiB: what fits on gpus=8 takes more in a node; the smallest estimate is \d.*GiB "
            r"\(\d.*GiB to save a checkpoint\); use host_memory=\d+GiB or more GPUs$",
        ),
        ("+experiment=tiny gpus=8 host_memory=lots", "host_memory=lots is no size; write for example host_memory=1TiB"),
    ],
)
def test_a_mistake_is_answered_in_a_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        planner.main(arguments.split())
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_sizes_have_units():
    cluster, others = planner.cluster_of(
        ["gpus=16", "a=b", "memory=141GiB", "host_memory=1TiB", "network=50GB/s", "node=4"]
    )
    assert cluster == Cluster(16, memory=141 * GIB, host_memory=1024 * GIB, network=50e9, node=4) and others == ["a=b"]


@pytest.mark.parametrize("experiment, ranks", [("dense7b_1to3", 8), ("moe80b_1to11", 64)])
def test_the_layouts_that_experiments_come_with_fit_into_80_gib(experiment, ranks):
    config = resolved(f"+experiment={experiment}", f"dry_run={ranks}")
    fixed = [f"parallel.{field.name}" for field in fields(config.parallel)]
    fixed += [f"phases.{name}.micro_batch" for name in config.phases]
    (only,) = choices(config, Cluster(ranks, memory=80 * GIB), fixed)
    assert only.config.parallel == config.parallel


def test_a_run_that_will_hardly_fit_is_told_so_before_it_starts():
    without = resolved("+experiment=dense7b_1to3", "parallel=default", "dry_run=8")
    words = overfull(without, 8, 80 * GIB)
    assert re.search(r"needs \d{3}\.?\d* GiB on a GPU, and this one has 80 GiB\. .* with gpus=8 memory=80GiB$", words)
    assert overfull(without, 8, 400 * GIB) is None
    assert overfull(resolved("+experiment=dense7b_1to3", "dry_run=8"), 8, 80 * GIB) is None
    without.engine = EngineName.deepspeed  # of which nothing is known
    assert overfull(without, 8, 80 * GIB) is None


# parallel.pipeline=auto


def test_auto_becomes_the_numbers_that_the_planner_would_choose():
    config = resolved(
        "+experiment=moe80b_1to11",
        "parallel=default",
        "parallel.recompute=selective",
        "dry_run=512",
        "parallel.tensor=4",
        "parallel.expert=8",
        "parallel.memory=141",
        "parallel.pipeline=auto",
        "parallel.virtual=auto",
    )
    fixed = ["parallel.tensor", "parallel.expert", "parallel.recompute", "phases.pretrain.micro_batch"]
    best = choices(config, Cluster(512, memory=141 * GIB), fixed)[0].config.parallel
    assert (config.parallel.pipeline, config.parallel.virtual) == (best.pipeline, best.virtual) == (2, 2)


def test_auto_takes_more_stages_where_memory_is_short():
    given = ["+experiment=moe80b_1to11", "parallel=default", "dry_run=512", "parallel.tensor=4", "parallel.expert=8"]
    given.append("parallel.recompute=selective")
    stages = [
        resolved(*given, f"parallel.memory={memory}", "parallel.pipeline=auto").parallel.pipeline
        for memory in (141, 80, 70)
    ]
    assert stages == sorted(stages) and stages[0] < stages[-1]


@pytest.mark.parametrize(
    "overrides, message",
    [
        ("parallel.pipeline=auto plan=true", "parallel.pipeline=auto needs the number of ranks: use dry_run=N"),
        ("parallel.pipeline=some", "parallel.pipeline=some must be a number of 1 or more, or auto"),
        ("parallel.virtual=1.5", "parallel.virtual=1.5 must be a number of 1 or more, or auto"),
        ("parallel.pipeline=true", "parallel.pipeline=True must be a number"),
        ("parallel.pipeline=auto dry_run=256", "nothing fits into parallel.memory=80 GiB on 256 ranks"),
        (
            "parallel.pipeline=auto dry_run=256 parallel.memory=9 parallel.recompute=full parallel.recompute_layers=1",
            "nothing fits into parallel.memory=9 GiB .* use no parallel.recompute_layers",
        ),
        ("parallel.virtual=auto dry_run=500 parallel.tensor=4", "= 4 does not divide|does not divide"),
        (
            "parallel.pipeline=auto parallel.virtual=4 dry_run=64 parallel.tensor=4 parallel.expert=16",
            "no number of stages is valid on 64 ranks with parallel.virtual=4; use parallel.virtual=auto",  # 5 blocks
        ),
    ],
)
def test_an_auto_that_cannot_be_is_refused(overrides, message):
    with pytest.raises(Exception, match=message) as error:
        resolved("+experiment=moe80b_1to11", "parallel=default", *overrides.split())
    assert isinstance(error.value, ConfigError) or "ConfigError" in repr(error.value)
