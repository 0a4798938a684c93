"""Mistakes through the real command line: exit code 2, one sentence on stderr that says what to do, no traceback.

Two commands are started from scratch, the others as forks of a process that has imported torch and Megatron.
"""

import random
import shutil
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest

from data.prepare import Preparation, prepare
from tests.forks import ROOT, Fork, clean_environment

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


def train(*arguments: str) -> Shown:
    """What `python train.py argument ...` shows."""
    process = Fork(arguments)
    output, errors = process.communicate()
    return Shown(process.returncode, output, errors)


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
def trained(corpus, tmp_path_factory):
    """The arguments of a run that has a checkpoint after its first step, and its folder."""
    run = tmp_path_factory.mktemp("trained") / "run"
    arguments = [*SMALL, f"data.path={corpus}", f"run.dir={run}"]
    shown = train(*arguments, "max_steps=1")
    assert shown.code == 0 and "Stopped after 1 steps" in shown.output, shown.errors
    return arguments, run


# Data


def test_a_missing_corpus_is_answered_with_the_command_that_makes_it(small, tmp_path):
    sentence = train(*small, f"data.path={tmp_path}/none").sentence
    assert f"corpus {tmp_path}/none does not exist" in sentence
    assert f"python -m data.prepare input=stdlib output={tmp_path}/none" in sentence


def test_no_corpus_at_all_is_answered_with_the_key(small):
    assert "data.path is not set: give data.path=FOLDER" in train(*small, "data.path=null").sentence


def test_an_empty_folder_is_no_corpus(small, tmp_path):
    (tmp_path / "empty").mkdir()
    sentence = train(*small, f"data.path={tmp_path}/empty").sentence
    assert f"corpus {tmp_path}/empty is no prepared corpus; make one with" in sentence


def test_a_flipped_byte_in_a_shard_is_found_and_named(small, corpus, tmp_path):
    damaged = shutil.copytree(corpus, tmp_path / "damaged")
    shard = damaged / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[int(np.load(shard.with_suffix(".idx"))["tokens_at"][0]) + 100] ^= 1
    shard.write_bytes(content)
    sentence = train(*small, f"data.path={damaged}", "max_steps=1").sentence
    assert sentence.startswith(f"chunk train-000000-000000 of {shard} is damaged (checksum); copy it again")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused_with_a_size_that_works(small, corpus):
    sentence = train(*small, "model.vocabulary=256").sentence
    assert f"the tokenizer of {corpus} has 257 tokens, model.vocabulary=256" in sentence
    assert "use model.vocabulary=384 or" in sentence


def test_a_corpus_smaller_than_a_batch_is_refused(small):
    sentence = train(*small, "phases.pretrain.global_batch=4096").sentence
    assert "fewer than one batch (phases.pretrain.global_batch=4096)" in sentence
    assert "phases.pretrain.sequence_length=64" in sentence


def test_a_corpus_shorter_than_one_sequence_is_refused(small):
    sentence = train(*small, "phases.pretrain.sequence_length=1048576").sentence
    assert "one window of sequence_length=1048576 needs 1,048,577" in sentence


def test_path_and_blend_together_are_refused(small, corpus):
    sentence = train(*small, f"+data.blend={{{corpus}:1.0}}").sentence
    assert f"data.path={corpus} and data.blend={{'{corpus}': 1.0}}: give one of the two" in sentence


def test_a_blend_with_a_negative_weight_is_refused(small, corpus):
    assert "weight" in train(*small, "data.path=null", f"+data.blend={{{corpus}:-1.0}}").sentence


# Where the run writes and what it goes on from


def test_a_run_folder_below_a_file_is_refused(small, tmp_path):
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
def test_a_checkpoint_of_another_architecture_is_refused_and_its_folder_left_as_it_was(trained, change, named):
    arguments, run = trained
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    sentence = train(*arguments, change).sentence
    assert f"checkpoint {run}/checkpoints/step-00000001 is of another architecture: {named}" in sentence
    assert "choose another run.dir, or use the checkpoint's value" in sentence
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_checkpoint_that_saw_other_data_is_refused_unless_allowed(trained):
    arguments, _ = trained
    sentence = train(*arguments, "run.seed=5").sentence
    assert "saw other data (corpus, blend or run.seed differ); set data.allow_change=true" in sentence


def test_resume_never_does_not_overwrite_checkpoints(trained):
    arguments, run = trained
    sentence = train(*arguments, "resume=never").sentence
    assert f"resume=never, but {run}/checkpoints/step-00000001 exists and would be overwritten" in sentence
    assert "choose another run.dir" in sentence and "resume=auto" in sentence


def test_resume_from_nowhere_is_refused(small):
    sentence = train(*small, "resume=NOWHERE").sentence
    assert sentence.startswith("resume=NOWHERE is no checkpoint; use resume=auto, resume=never or a folder step-")


def test_resume_from_a_folder_that_is_no_checkpoint_is_refused(small, corpus):
    assert f"{corpus} is no checkpoint: about.json cannot be read" in train(*small, f"resume={corpus}").sentence


def test_a_damaged_checkpoint_given_by_name_is_refused(small, trained, tmp_path):
    damaged = shutil.copytree(trained[1] / "checkpoints/step-00000001", tmp_path / "step-00000001")
    file = next(damaged.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    sentence = train(*small, f"resume={damaged}").sentence
    assert f"checkpoint {damaged} is damaged: {file.name} differs from what was written" in sentence


def test_a_run_refused_for_its_seed_goes_on_when_data_may_change(trained, tmp_path):
    """Also the proof that the checkpoint is a good one: what is refused above is refused for the reason it says."""
    arguments, run = trained
    copy = shutil.copytree(run, tmp_path / "run")
    shown = train(*arguments, f"run.dir={copy}", "run.seed=5", "data.allow_change=true", "max_steps=2")
    assert shown.code == 0 and "Stopped after 2 steps" in shown.output, shown.errors
    assert "run.seed=5" in (copy / "settings.txt").read_text()


# Kernels


def test_triton_by_name_is_never_replaced(small):
    """Without a GPU, with or without the package triton."""
    sentence = train(*small, "kernels=triton").sentence
    assert "kernels=triton" in sentence and "kernels=reference" in sentence


# Started from scratch


def test_a_mistake_found_late_looks_the_same_from_a_fresh_interpreter(small, tmp_path):
    command = [sys.executable, "train.py", *small, f"data.path={tmp_path}/none"]
    result = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=120)
    assert "does not exist" in Shown(result.returncode, result.stdout, result.stderr).sentence
    assert result.stdout == "" and result.stderr.count("\n") == 1  # third parties are quiet, too


def test_under_torchrun_only_the_first_rank_speaks(small):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "train.py", *small, "model.layer=3"]
    result = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert result.stderr.count("error: ") == 1  # torchrun's own report follows
    assert "error: model.layer is no key of the configuration; did you mean model.layers" in result.stderr
    assert 'train.py", line' not in result.stderr  # no traceback of ours in it
