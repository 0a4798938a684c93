"""The configuration as a user meets it: what composes, where each value came from, and the real command line."""

import copy
import re
import subprocess
import sys
from dataclasses import asdict

import pytest
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict

from hysparse.choices import DecayShape, Gate, Source
from hysparse.compose import CONF, provenance, resolve
from hysparse.plan import Plan
from tests.hysparse.composing import LAUNCHER_VARIABLES, composed, resolved

pytestmark = pytest.mark.usefixtures("one_process")

ROOT = CONF.parent
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
MODELS = {"tiny": 2, "dense7b_1to3": 3, "moe80b_1to11": 11}  # experiment: its ratio


def command_line(*arguments: str, interpreter: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """`python train.py ...` in the root of the project."""
    command = [sys.executable, *interpreter, "train.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


# What there is


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_passes_the_checks(experiment):
    config = resolved(f"+experiment={experiment}", "plan=true")  # for any number of processes
    assert config.phases and config.run.dir == f"runs/{config.model.name}-{config.attention.name}"
    assert Plan(config.model, config.attention).pattern.endswith("F")


def test_a_run_without_an_experiment_composes_too():
    config = resolved()
    assert (config.model.name, config.attention.name) == ("tiny", "hysparse")


@pytest.mark.parametrize(
    "attention, sparse_kv, window_kv, gate",
    [
        ("hybrid_swa", Source.none, Source.own, Gate.none),
        ("hysparse", Source.shared, Source.own, Gate.headwise),
        ("hysparse_no_swa", Source.own, Source.none, Gate.headwise),
        ("hysparse_own_kv", Source.own, Source.own, Gate.headwise),
        ("hysparse_shared_swa", Source.shared, Source.shared, Gate.headwise),
    ],
)
@pytest.mark.parametrize("experiment", MODELS)
def test_one_word_switches_the_variant_and_the_ratio_stays_the_models(
    experiment, attention, sparse_kv, window_kv, gate
):
    chosen = resolved(f"+experiment={experiment}", f"attention={attention}", "plan=true").attention
    assert (chosen.name, chosen.ratio, chosen.last_full) == (attention, MODELS[experiment], True)
    assert (chosen.sparse_kv, chosen.window_kv, chosen.gate) == (sparse_kv, window_kv, gate)
    assert chosen.output_gate is Gate.none
    assert (chosen.block, chosen.tokens, chosen.window) == ((16, 64, 32) if experiment == "tiny" else (64, 1024, 128))


@pytest.mark.parametrize("experiment", MODELS)
def test_the_full_baseline_has_an_output_gate_in_the_80b_only(experiment):
    config = resolved(f"+experiment={experiment}", "attention=full", "plan=true")
    assert set(Plan(config.model, config.attention).pattern) == {"F"}
    assert config.attention.output_gate is (Gate.elementwise if experiment == "moe80b_1to11" else Gate.none)


def test_every_variant_is_an_ablation_of_the_7b_and_nothing_else_differs():
    sevenb = asdict(resolved("+experiment=dense7b_1to3", "plan=true"))
    for attention in sorted(path.stem for path in (CONF / "attention").glob("*.yaml")):
        ablation = resolved(f"+experiment=ablation_{attention}", "plan=true")
        chosen = resolved("+experiment=dense7b_1to3", f"attention={attention}", "plan=true")
        assert ablation.attention == chosen.attention
        for section in sevenb.keys() - {"attention", "run"}:
            assert asdict(ablation)[section] == sevenb[section]


def test_the_recipes_are_the_papers():
    """Section 4.1."""
    dense, moe = (resolved(f"+experiment={name}", "plan=true") for name in ("dense7b_1to3", "moe80b_1to11"))
    stages = [(name, phase.tokens, phase.sequence_length, phase.learning_rate) for name, phase in dense.phases.items()]
    assert stages == [("pretrain", 10**12, 8192, 8.3e-4), ("long_context", 2 * 10**11, 32768, 3.0e-5)]
    assert dense.phases["long_context"].rope_base == 640_000
    (only,) = moe.phases.values()
    assert (only.tokens, only.sequence_length, only.learning_rate) == (5 * 10**11, 32768, 1e-3)
    assert only.rope_base == 640_000
    for config in (dense, moe):
        optim = config.optim
        assert (optim.beta1, optim.beta2, optim.epsilon, optim.weight_decay) == (0.9, 0.95, 1e-10, 0.1)
        assert optim.clip == 1.0


def test_the_command_line_wins_over_experiment_and_groups():
    config = resolved("+experiment=tiny", "attention.block=32", "model.hidden=64", "run.name=mine", "max_steps=7")
    assert (config.attention.block, config.model.hidden, config.max_steps) == (32, 64, 7)
    assert config.run.dir == "runs/mine"


@pytest.mark.parametrize("launcher", [("RANK", "WORLD_SIZE", "LOCAL_RANK"), LAUNCHER_VARIABLES[3:]])
def test_all_ranks_see_the_same_configuration_and_run_folder(monkeypatch, launcher):
    seen = []
    for rank in (0, 5, 7):
        for name in launcher:
            monkeypatch.setenv(name, "8" if name in ("WORLD_SIZE", "SLURM_NTASKS") else str(rank))
        seen.append(asdict(resolved("+experiment=tiny", "phases.pretrain.micro_batch=1", "~phases.long_context")))
    assert seen[0] == seen[1] == seen[2]
    assert seen[0]["run"]["dir"] == "runs/tiny-hysparse"


# Where values come from


@pytest.fixture
def sources():
    """sources(override, ...) as the run would print them."""

    def of(*overrides: str) -> dict[str, dict]:
        config = copy.deepcopy(composed(*overrides, with_hydra=True))
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            del config["hydra"]
        return provenance(resolve(config))

    yield of
    HydraConfig.instance().cfg = None


def test_each_value_is_found_where_it_was_set_last(sources):
    found = sources("+experiment=tiny", "attention=full", "max_steps=20", "model.moe.experts=16", "attention.window=8")
    assert list(found) == [
        "command line",
        "experiment=tiny",
        "phases=tiny",
        "attention=full",
        "model=tiny",
        "conf/config.yaml",
    ]
    assert found["command line"] == {"model.moe.experts": 16, "attention.window": 8, "max_steps": 20}
    assert found["experiment=tiny"]["attention.block"] == 16 and "attention.window" not in found["experiment=tiny"]
    assert found["attention=full"] == {"attention.name": "full", "attention.ratio": 0}
    assert found["model=tiny"]["model.hidden"] == 128 and "model.moe.experts" not in found["model=tiny"]
    assert found["phases=tiny"]["phases.pretrain.sequence_length"] == 256
    assert found["conf/config.yaml"] == {"run.name": "tiny-full", "run.dir": "runs/tiny-full"}


def test_each_value_that_is_no_default_is_named_once(sources):
    overrides = ["+experiment=ablation_hybrid_swa", "plan=true", "phases.pretrain.decay_shape=sqrt", "optim.clip=1.0"]
    found = sources(*overrides)
    keys = [key for values in found.values() for key in values]
    assert len(keys) == len(set(keys))
    config = OmegaConf.structured(resolved(*overrides))
    assert all(OmegaConf.select(config, key) == value for values in found.values() for key, value in values.items())
    # optim.clip=1.0 is the default
    assert found["command line"] == {"plan": True, "phases.pretrain.decay_shape": DecayShape.sqrt}
    assert found["parallel=dense7b"] == {"parallel.tensor": 4}  # chosen by its parent


def test_a_whole_section_on_the_command_line_is_found_there(sources):
    found = sources("phases.pretrain={learning_rate:1e-3,rope_base:500}", "+data.blend={corpus/a:1,corpus/b:3}")
    assert found["command line"]["phases.pretrain.learning_rate"] == 1e-3
    assert found["command line"]["data.blend"] == {"corpus/a": 1, "corpus/b": 3}


def test_an_experiment_in_a_folder_of_the_users_own_is_found(sources, tmp_path):
    (tmp_path / "experiment").mkdir()
    last = "{tokens: 4096, sequence_length: 256, global_batch: 8, learning_rate: 1e-4}"
    mine = f"defaults: [tiny]\noptim: {{clip: 0.5}}\nmodel: {{hidden: 64}}\nphases: {{last: {last}}}\n"
    (tmp_path / "experiment/mine.yaml").write_text(f"# @package _global_\n{mine}")
    found = sources(f"hydra.searchpath=[file://{tmp_path}]", "+experiment=mine")
    assert found["experiment=mine"]["optim.clip"] == 0.5
    assert found["experiment=mine"]["model.hidden"] == 64 and "model.hidden" not in found["model=tiny"]
    assert found["experiment=mine"]["phases.last.tokens"] == 4096
    assert found["experiment=mine"]["attention.block"] == 16


# The real command line


def test_help_lists_every_experiment_sweep_and_group_and_names_keys_that_exist():
    shown = command_line("--help")
    assert shown.returncode == 0 and shown.stderr == ""
    lines = shown.stdout.splitlines()
    for name in EXPERIMENTS:
        headline = (CONF / f"experiment/{name}.yaml").read_text().splitlines()[1]
        assert headline.startswith("# ") and f"  {name:<30}{headline.removeprefix('# ')}" in lines
    experiments = lines.index("Experiments")
    assert lines[experiments + len(EXPERIMENTS) + 1] == ""  # and no others
    sweeps = sorted((CONF / "sweep").glob("*.yaml"))
    headlines = [f"  {path.stem:<30}{path.read_text().splitlines()[1].removeprefix('# ')}" for path in sweeps]
    at = next(number for number, line in enumerate(lines) if line.startswith("Sweeps"))
    assert lines[at + 1 : at + len(sweeps) + 2] == [*headlines, ""]
    elsewhere = ("experiment", "sweep", "hydra")  # the last is Hydra's own
    for group in (folder for folder in CONF.iterdir() if folder.is_dir() and folder.name not in elsewhere):
        options = ", ".join(sorted(path.stem for path in group.glob("*.yaml")))
        assert f"  {group.name:<12}{options}" in lines
    schema = OmegaConf.structured(resolved())
    often_used = "\n".join(lines[lines.index("Often used") :])
    keys = re.findall(r"^ +([a-z_.]+)=|(?<=N )([a-z.]+)=N", often_used, re.MULTILINE)
    assert len(keys) > 8
    for key in map("".join, keys):
        OmegaConf.select(schema, key, throw_on_missing=True)
        assert OmegaConf.select(schema, key, default="no such key") != "no such key"


def test_the_whole_configuration_can_be_printed():
    arguments = "+experiment=moe80b_1to11", "plan=true"
    shown = command_line(*arguments, "--cfg", "job", "--resolve")
    assert shown.returncode == 0 and shown.stderr == ""
    config = OmegaConf.structured(resolved(*arguments))
    assert yaml.safe_load(shown.stdout) == OmegaConf.to_container(config, enum_to_str=True)


@pytest.mark.parametrize("experiment, layers, full", [("dense7b_1to3", 36, 10), ("moe80b_1to11", 49, 5)])
def test_a_plan_prints_the_papers_numbers_without_importing_torch(experiment, layers, full):
    shown = command_line(f"+experiment={experiment}", "plan=true", interpreter=("-X", "importtime"))
    assert shown.returncode == 0
    imported = {line.split("|")[-1].strip() for line in shown.stderr.splitlines()}
    assert "hysparse.plan" in imported
    assert not imported & {"torch", "megatron", "megatron.core", "triton", "numpy", "data", "kernels"}
    assert f"Layers: {layers}, {full} of them full" in shown.stdout
    total, active = map(float, re.search(r"Parameters: ([\d.]+) B in total, ([\d.]+) B active", shown.stdout).groups())
    smaller = [float(times) for times in re.findall(r"KiB +([\d.]+) ×$", shown.stdout, re.MULTILINE)]
    if experiment == "dense7b_1to3":
        assert 7 <= total <= 8 and active == total
        assert len(smaller) == 2 and min(smaller) > 3  # 26 of 36 layers keep 128 tokens only
    else:
        assert total == pytest.approx(80, rel=0.03) and 3 <= active <= 4
        assert min(smaller) >= 9


def test_a_mistake_ends_with_exit_code_2_and_one_line():
    shown = command_line("+experiment=tiny", "model.layer=3", "plan=true")
    assert shown.returncode == 2 and shown.stdout == ""
    assert shown.stderr.startswith("error: model.layer is no key") and shown.stderr.count("\n") == 1
