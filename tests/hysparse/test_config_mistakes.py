"""Values that cannot be, typing mistakes, and how a user is told of them."""

import re

import pytest

from hysparse.config import ConfigError
from hysparse.mistakes import HEAD_START, PATIENCE, mistakes_without_traceback
from tests.hysparse.composing import message, one_phase, resolved

pytestmark = pytest.mark.usefixtures("one_process")


# Values


def test_deepspeed_that_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("hysparse.checks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="not installed here; pip install deepspeed==0.19.8, or use"):
        one_phase("engine=deepspeed")
    one_phase("engine=deepspeed", "plan=true")  # starts nothing


@pytest.mark.parametrize(
    "override",
    [
        "model.layers=0",
        "model.moe.ffn=-1",
        "attention.window=0",
        "attention.ratio=-1",
        "phases.pretrain.tokens=0",
        "phases.pretrain.learning_rate=0.0",
        "phases.pretrain.warmup_tokens=-1",
        "phases.pretrain.minimum_learning_rate=-0.001",
        "parallel.tensor=0",
        "run.timeout=0",
        "optim.beta2=1.0",
        "optim.epsilon=0.0",
        "optim.clip=-1.0",
        "checkpoint.every=0",
        "checkpoint.keep=-1",
        "logging.every=0",
        "logging.validate_every=-5",
        "logging.experts_every=-1",
        "model.moe.shared_ffn=-1",
        "model.moe.capacity_factor=-1",
        "model.moe.first_dense_layers=-1",
        "model.moe.groups=0",
        "attention.pattern=SFFFFFF",
        "attention.pattern=FSXFSSF",
    ],
)
def test_a_value_out_of_range_is_named(override):
    with pytest.raises(ConfigError, match=re.escape(override)):
        one_phase(override)


def test_a_path_may_have_any_characters_in_quotes():
    assert resolved('run.dir="/tmp/~Jürgen/a=b, c"').run.dir == "/tmp/~Jürgen/a=b, c"


@pytest.mark.parametrize("key", ["run.name", "run.dir"])
def test_an_empty_run_folder_is_not_the_current_one(key):
    with pytest.raises(ConfigError, match=f"{key} is empty; .*run.dir=runs/"):
        one_phase(f"{key}=")


def test_a_run_without_phases_is_refused():
    with pytest.raises(ConfigError, match="phases is empty.*phases=tiny"):
        resolved("+experiment=tiny", "~phases.pretrain", "~phases.long_context")


def test_a_plan_needs_no_processes():
    config = resolved("+experiment=dense7b_1to3", "parallel.tensor=8", "parallel.pipeline=2", "plan=true")
    assert config.parallel.tensor == 8
    with pytest.raises(ConfigError, match="= 16 does not divide the 1 processes"):
        resolved("+experiment=dense7b_1to3", "parallel.tensor=8", "parallel.pipeline=2")


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ("dry_run=0", "dry_run=0 must be the number of ranks"),
        ("dry_run=8 plan=true", "plan=true and dry_run=8: .*leave out plan=true"),
        (
            "dry_run=500 parallel.tensor=4 parallel.pipeline=4",
            "= 16 does not divide the 500 .* or set dry_run=256 or 512$",
        ),
        ("dry_run=512", "global_batch=256; .*parallel.pipeline of 2 or more; or set dry_run=256$"),
        (
            "dry_run=96 parallel.tensor=2 parallel.pipeline=4 parallel.expert=32",
            "parallel.expert=32 x parallel.pipeline=4 does not divide the 96 .* or set dry_run=128$",
        ),
    ],
)
def test_a_dry_run_that_cannot_work_names_the_nearest_that_would(overrides, expected):
    with pytest.raises(ConfigError, match=expected):
        resolved("+experiment=moe80b_1to11", "parallel=default", *overrides.split())


def test_a_dry_run_takes_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="dry_run=4 takes one process, not 2; .*without torchrun"):
        resolved("+experiment=tiny", "dry_run=4")


# Typing mistakes


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ("model.layer=3", "model.layer is no key of the configuration; did you mean model.layers"),
        ("atention=full", "atention is no key of the configuration; did you mean attention"),
        ("+new=1", "new is no key"),
        ("++resum=never", "resum is no key of the configuration; did you mean resume"),
        ("+model.moe.expert=4", "model.moe.expert is no key of the configuration; did you mean model.moe.experts?"),
        ("+optim.betas=1", "optim.betas is no key .* optim.beta[12]"),
        ("phases.pretrain.token=1", "phases.pretrain.token is no key .* did you mean phases.pretrain.tokens"),
        ("+phases.pretrain.rope=1", "phases.pretrain.rope is no key .* phases.pretrain.rope_base"),
        ("+phases.more.tokens=1", "phases.more does not exist, .* conf/phases/NAME.yaml"),
        ("phases.more={tokens:1}", "phases.more does not exist, .* conf/phases/NAME.yaml"),
        ("data.blend={corpus/a:1}", r"corpus/a is a new entry, which takes a plus: \+data.blend={"),
        ("model=dense7b model.moe.experts=8", "model.moe is null .*choose an MoE model, such as model=tiny"),
        ("model=dense7b model.moe={experts:8}", "model.moe is null .*choose an MoE model, such as model=tiny"),
        ("model.layers=three", "model.layers: .*'three'.* Integer"),
        ("model.layers=1.5", "model.layers: .*'1.5'.* Integer"),
        ("optim.beta1=x", "optim.beta1: .*'x'.* Float"),
        ("logging.wandb=maybe", "logging.wandb: .*'maybe'.* bool"),
        ("model.layers=null", "model.layers has no value and needs one; give model.layers=VALUE"),
        ("phases.pretrain.tokens=???", "phases.pretrain.tokens has no value and needs one"),
        ("~phases.pretrain.tokens", "phases.pretrain.tokens has no value and needs one"),
        ("phases.pretrain.tokens=1e9", "phases.pretrain.tokens must be a whole number; write .*=1_000_000_000$"),
        ("kernels=fast", "kernels: Invalid value 'fast', expected one of .auto, triton, reference"),
        ("phases.pretrain.decay_shape=exp", r"decay_shape: Invalid value 'exp', expected one of .linear, cosine, sqrt"),
        ("attention.sparse_kv=shard", "attention.sparse_kv: Invalid value 'shard', expected one of .none, own, shared"),
        ("run.dir=${nowhere}", "run.dir: .*nowhere"),
        ("run.name=${run.dir}", "run.(name|dir): .*[Rr]ecursive"),
        ("model=null", "group=option"),
        ("attention=hysparce", "attention=hysparce does not exist; did you mean attention=hysparse.* hybrid_swa"),
        ("+experiment=tinny", "experiment=tinny does not exist; did you mean experiment=tiny.* moe80b_1to11"),
        ("experiment=tiny", r"\+experiment=tiny"),
        ("model.layers", "model.layers is no override; write key=value"),
        ("run.dir=/tmp/~me", """/tmp/~me cannot be read; .*: 'run.dir="/tmp/~me"'"""),
    ],
)
def test_a_typing_mistake_gets_one_sentence_that_helps(capsys, overrides, expected):
    assert re.search(expected, message(capsys, *overrides.split()))


@pytest.mark.parametrize(
    "content, expected",
    [
        ("model: {moe: {expert: 4}}", "experiment/mine.yaml: model.moe.expert is no key .* model.moe.experts"),
        ("modle: {layers: 4}", "experiment/mine.yaml: modle is no key .* did you mean model"),
        ("phases: {pretrain: {token: 4}}", "experiment/mine.yaml: .*did you mean phases.pretrain.tokens"),
        ("model: {layers: four}", "experiment/mine.yaml: model.layers: .*'four'"),
        ("model: {layers: 4", "mine.yaml"),
        ("defaults: [override /model: huge]", "model=huge does not exist; model is one of dense7b, moe80b, tiny"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(capsys, tmp_path, content, expected):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(f"# @package _global_\n{content}\n")
    assert re.search(expected, message(capsys, f"hydra.searchpath=[file://{tmp_path}]", "+experiment=mine"))


def test_other_ranks_leave_the_first_one_time_to_speak_and_repeat_nothing(capsys, monkeypatch):
    """A launcher kills all ranks when the first of them ends; the one that prints must not be killed before it has."""
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit, match="2"), mistakes_without_traceback():
        resolved("model.layers=0")
    assert capsys.readouterr().err == "" and slept == [PATIENCE]


def test_a_node_with_another_configuration_than_the_first_rank_says_once_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for rank in (8, 9):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank - 8))
        with pytest.raises(SystemExit, match="2"), mistakes_without_traceback():
            resolved("model.layers=0")
    errors = capsys.readouterr().err
    assert errors.startswith("error: rank 8: model.layers=0") and "rank 9" not in errors


def test_the_first_of_several_ranks_speaks_and_leaves_the_others_time_to_come_as_far(capsys, monkeypatch):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    for ranks in ("1", "2"):
        monkeypatch.setenv("WORLD_SIZE", ranks)
        with pytest.raises(SystemExit, match="2"), mistakes_without_traceback():
            resolved("model.layers=0")
        assert capsys.readouterr().err.startswith("error: model.layers=0")
    assert slept == [HEAD_START] and HEAD_START < PATIENCE  # alone it ends at once


def test_what_only_another_rank_has_met_is_said_by_that_rank(capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit, match="2"), mistakes_without_traceback(KeyError):
        raise KeyError("shard")
    assert capsys.readouterr().err == "error: rank 3: 'shard'\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ValueError, match="ours"), mistakes_without_traceback():
        raise ValueError("ours")
