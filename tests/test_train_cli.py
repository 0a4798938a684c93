"""Mistakes through the real command line: exit code 2, one sentence on stderr that says what to do, no traceback.

Starting Python with torch and Megatron takes most of such a run. So one process imports them, and each command line is
a fork of it that runs `train.py` as a script; two commands are started from scratch to show that nothing hangs on that.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from data.prepare import Preparation, prepare

ROOT = Path(__file__).parent.parent
FORKS = """
import gc, json, os, runpy, sys
import hysparse.trainer, hydra.main, matplotlib.pyplot
gc.freeze()  # no child walks, and so copies, what is here already
for line in sys.stdin:
    arguments, folder = json.loads(line)
    child = os.fork()
    if child == 0:
        for stream, name in (1, "output"), (2, "errors"):
            os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.argv = ["train.py", *arguments]
        runpy.run_path("train.py", run_name="__main__")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
SMALL = (
    "+experiment=tiny ~phases.long_context model.layers=3 model.hidden=32 model.heads=2 model.kv_heads=2 "
    "model.head_dim=16 model.moe.experts=4 model.moe.ffn=32 model.vocabulary=257 attention.block=16 "
    "attention.tokens=32 attention.window=16 phases.pretrain.sequence_length=64 phases.pretrain.global_batch=4 "
    "phases.pretrain.micro_batch=2 phases.pretrain.tokens=1024 phases.pretrain.warmup_tokens=0 "
    "phases.pretrain.decay_tokens=0 logging.validate_every=0 logging.tensorboard=false"
).split()


class Shown(NamedTuple):
    code: int
    output: str
    errors: str

    @property
    def sentence(self) -> str:
        """The only line on stderr that begins with "error:"; progress bar and warnings may be there too."""
        assert "Traceback" not in self.output + self.errors, self.errors
        (found,) = [line for line in self.errors.splitlines() if line.startswith("error: ")]
        assert self.code == 2
        return found.removeprefix("error: ")


@pytest.fixture(scope="module")
def environment():
    """One process, on the CPU, without what a launcher or the kernels' tests set."""
    launcher = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "SLURM_NTASKS",
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "HYDRA_FULL_ERROR",
        "TRITON_INTERPRET",
    )
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    return kept | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def forks(environment):
    command = [sys.executable, "-c", FORKS]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT, "env": environment}
    with subprocess.Popen(command, **pipes) as process:
        yield process


@pytest.fixture(scope="module")
def train(forks, tmp_path_factory):
    """train(argument, ...) is what `python train.py argument ...` shows."""
    folder = tmp_path_factory.mktemp("shown")

    def run(*arguments: str) -> Shown:
        forks.stdin.write(json.dumps([list(map(str, arguments)), str(folder)]) + "\n")
        forks.stdin.flush()
        code = int(forks.stdout.readline())
        return Shown(code, (folder / "output").read_text(), (folder / "errors").read_text())

    return run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A few thousand bytes as tokens, in 40 documents."""
    folder = tmp_path_factory.mktemp("text")
    words = random.Random(1)
    for i in range(40):
        (folder / f"{i}.txt").write_text(" ".join(str(words.randrange(1000)) for _ in range(100)))
    path = folder.parent / f"{folder.name}-corpus"
    prepare(Preparation(input=str(folder), output=str(path), tokenizer="bytes", validation=0.1, workers=1))
    return path


@pytest.fixture
def small(corpus, tmp_path):
    """The arguments of a run of seconds, into a new folder."""
    return [*SMALL, f"data.path={corpus}", f"run.dir={tmp_path / 'run'}"]


@pytest.fixture(scope="module")
def trained(train, corpus, tmp_path_factory):
    """The arguments of a run that has a checkpoint after its first step, and its folder."""
    run = tmp_path_factory.mktemp("trained") / "run"
    arguments = [*SMALL, f"data.path={corpus}", f"run.dir={run}"]
    shown = train(*arguments, "max_steps=1")
    assert shown.code == 0 and "Stopped after 1 steps" in shown.output, shown.errors
    return arguments, run


# Data


def test_a_missing_corpus_is_answered_with_the_command_that_makes_it(train, small, tmp_path):
    sentence = train(*small, f"data.path={tmp_path}/none").sentence
    assert f"corpus {tmp_path}/none does not exist" in sentence
    assert f"python -m data.prepare input=stdlib output={tmp_path}/none" in sentence


def test_no_corpus_at_all_is_answered_with_the_key(train, small):
    assert "data.path is not set: give data.path=FOLDER" in train(*small, "data.path=null").sentence


def test_an_empty_folder_is_no_corpus(train, small, tmp_path):
    (tmp_path / "empty").mkdir()
    sentence = train(*small, f"data.path={tmp_path}/empty").sentence
    assert f"corpus {tmp_path}/empty is no prepared corpus; make one with" in sentence


def test_a_flipped_byte_in_a_shard_is_found_and_named(train, small, corpus, tmp_path):
    damaged = shutil.copytree(corpus, tmp_path / "damaged")
    shard = damaged / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[int(np.load(shard.with_suffix(".idx"))["tokens_at"][0]) + 100] ^= 1
    shard.write_bytes(content)
    sentence = train(*small, f"data.path={damaged}", "max_steps=1").sentence
    assert sentence.startswith(f"chunk train-000000-000000 of {shard} is damaged (checksum); copy it again")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused_with_a_size_that_works(train, small, corpus):
    sentence = train(*small, "model.vocabulary=256").sentence
    assert f"the tokenizer of {corpus} has 257 tokens, model.vocabulary=256" in sentence
    assert "use model.vocabulary=384 or" in sentence


def test_a_corpus_smaller_than_a_batch_is_refused(train, small):
    sentence = train(*small, "phases.pretrain.global_batch=4096").sentence
    assert "fewer than one batch (phases.pretrain.global_batch=4096)" in sentence
    assert "phases.pretrain.sequence_length=64" in sentence


def test_a_corpus_shorter_than_one_sequence_is_refused(train, small):
    sentence = train(*small, "phases.pretrain.sequence_length=1048576").sentence
    assert "one window of sequence_length=1048576 needs 1,048,577" in sentence


def test_path_and_blend_together_are_refused(train, small, corpus):
    sentence = train(*small, f"+data.blend={{{corpus}:1.0}}").sentence
    assert f"data.path={corpus} and data.blend={{'{corpus}': 1.0}}: give one of the two" in sentence


def test_a_blend_with_a_negative_weight_is_refused(train, small, corpus):
    assert "weight" in train(*small, "data.path=null", f"+data.blend={{{corpus}:-1.0}}").sentence


# Where the run writes and what it goes on from


def test_a_run_folder_below_a_file_is_refused(train, small, tmp_path):
    (tmp_path / "file").write_text("")
    sentence = train(*small, f"run.dir={tmp_path}/file/run").sentence
    assert sentence == f"run.dir={tmp_path}/file/run cannot be written (Not a directory); give another run.dir=FOLDER"


@pytest.mark.parametrize(
    "change, named",
    [
        ("model.layers=4", "model.layers is 3 there and 4 here"),
        ("attention.sinks=false", "attention.sinks is True there and False here"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused_and_its_folder_left_as_it_was(train, trained, change, named):
    arguments, run = trained
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    sentence = train(*arguments, change).sentence
    assert f"checkpoint {run}/checkpoints/step-00000001 is of another architecture: {named}" in sentence
    assert "choose another run.dir, or use the checkpoint's value" in sentence
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_checkpoint_that_saw_other_data_is_refused_unless_allowed(train, trained):
    arguments, _ = trained
    sentence = train(*arguments, "run.seed=5").sentence
    assert "saw other data (corpus, blend or run.seed differ); set data.allow_change=true" in sentence


def test_resume_never_does_not_overwrite_checkpoints(train, trained):
    arguments, run = trained
    sentence = train(*arguments, "resume=never").sentence
    assert f"resume=never, but {run}/checkpoints/step-00000001 exists and would be overwritten" in sentence
    assert "choose another run.dir" in sentence and "resume=auto" in sentence


def test_resume_from_nowhere_is_refused(train, small):
    sentence = train(*small, "resume=NOWHERE").sentence
    assert sentence.startswith("resume=NOWHERE is no checkpoint; use resume=auto, resume=never or a folder step-")


def test_resume_from_a_folder_that_is_no_checkpoint_is_refused(train, small, corpus):
    assert f"{corpus} is no checkpoint: about.json cannot be read" in train(*small, f"resume={corpus}").sentence


def test_a_damaged_checkpoint_given_by_name_is_refused(train, small, trained, tmp_path):
    damaged = shutil.copytree(trained[1] / "checkpoints/step-00000001", tmp_path / "step-00000001")
    file = next(damaged.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    sentence = train(*small, f"resume={damaged}").sentence
    assert f"checkpoint {damaged} is damaged: {file.name} differs from what was written" in sentence


def test_a_run_refused_for_its_seed_goes_on_when_data_may_change(train, trained, tmp_path):
    """Also the proof that the checkpoint is a good one: what is refused above is refused for the reason it says."""
    arguments, run = trained
    copy = shutil.copytree(run, tmp_path / "run")
    shown = train(*arguments, f"run.dir={copy}", "run.seed=5", "data.allow_change=true", "max_steps=2")
    assert shown.code == 0 and "Stopped after 2 steps" in shown.output, shown.errors
    assert "run.seed=5" in (copy / "settings.txt").read_text()


# Kernels


def test_triton_by_name_is_never_replaced(train, small):
    """Without a GPU, with or without the package triton."""
    sentence = train(*small, "kernels=triton").sentence
    assert "kernels=triton" in sentence and "kernels=reference" in sentence


# Started from scratch


def test_a_mistake_found_late_looks_the_same_from_a_fresh_interpreter(environment, small, tmp_path):
    command = [sys.executable, "train.py", *small, f"data.path={tmp_path}/none"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert "does not exist" in Shown(result.returncode, result.stdout, result.stderr).sentence
    assert result.stdout == "" and result.stderr.count("\n") == 1  # third parties are quiet, too


def test_under_torchrun_only_the_first_rank_speaks(environment, small):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "train.py", *small, "model.layer=3"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert result.stderr.count("error: ") == 1  # torchrun's own report follows
    assert "error: model.layer is no key of the configuration; did you mean model.layers" in result.stderr
    assert 'train.py", line' not in result.stderr  # no traceback of ours in it
