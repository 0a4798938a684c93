"""The selection of a trained oracle, saved for the benchmark, is the one that the model made on the held-out text."""

import json
from dataclasses import replace

import numpy
import pytest
import torch

from data import PackedSamples
from data.prepare import Preparation, prepare
from hysparse.capture import capture, compact, overlap, rope_base
from hysparse.run_folder import RunFolder
from kernels import bench_inputs, reference
from parallel import checkpoint
from parallel.checkpoint import CheckpointError
from tests.models import build_model, small_config

LENGTH = 200


@pytest.fixture
def config(tmp_path):
    """FSFSF with a run folder and 256 byte tokens of text, some of it held out."""
    text = tmp_path / "text"
    text.mkdir()
    for part in range(12):
        (text / f"{part}.txt").write_text(" ".join(str(n * n % 977) for n in range(part * 40, part * 40 + 40)))
    prepare(Preparation(input=str(text), output=str(tmp_path / "corpus"), tokenizer="bytes", validation=0.3, workers=1))
    config = small_config(ratio=1, tensor=2)  # trained on two ranks, captured on one
    config.model = replace(config.model, vocabulary=258)
    config.data.path, config.run.dir = str(tmp_path / "corpus"), str(tmp_path / "run")
    RunFolder(config, {})
    return config


def save(config, tmp_path, monkeypatch) -> numpy.ndarray:
    """Save a model with weights of no other origin; returns what its third layer selects on the held-out text."""
    model = build_model(replace(config, parallel=small_config().parallel)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    phase = {"rope_base": 500.0}
    about = {"progress": {"phase": 1, "samples": 0, "tokens": 1024}, "phases": {"only": phase}}
    checkpoint.save(tmp_path / "run/checkpoints", 4, {"model0": model.sharded_state_dict()}, about)

    selections, select = [], reference.scored_attention

    def recorded(*arguments):
        selections.append(select(*arguments)[1])
        return select(*arguments)

    text = PackedSamples([(config.data.path, 1.0)], "validation", LENGTH, seed=0, ordered=True)[0]["tokens"]
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(reference, "scored_attention", recorded)
        model(text[None], torch.zeros(1, LENGTH, dtype=torch.int32), 500.0)
    assert len(selections) == 2
    return selections[1][0].numpy()


def test_the_capture_is_what_the_last_oracle_of_the_checkpoint_selects(config, tmp_path, monkeypatch, megatron):
    expected = save(config, tmp_path, monkeypatch)
    output = tmp_path / "new/blocks.npz"
    assert f"blocks [2, {LENGTH}, 3] of layer 3 after 1,024 tokens" in capture(
        tmp_path / "run", LENGTH, output, megatron
    )
    found = numpy.load(output)
    assert found["blocks"].dtype == numpy.int16
    for head in range(2):
        for token in range(LENGTH):
            assert set(found["blocks"][head, token]) == set(expected[head, token])
    about = json.loads(str(found["about"]))
    assert (about["layer"], about["length"], about["tokens_trained"]) == (3, LENGTH, 1024)

    monkeypatch.setattr(bench_inputs, "DEVICE", "cpu")
    monkeypatch.setattr(bench_inputs, "CAPTURE", output)
    assert bench_inputs.captured_blocks(bench_inputs.Case("7b", 500)).shape == (1, 8, 500, 3)


def test_a_run_without_a_checkpoint_is_named(config, tmp_path, megatron):
    with pytest.raises(CheckpointError, match="run/checkpoints has no intact checkpoint"):
        capture(tmp_path / "run", LENGTH, tmp_path / "blocks.npz", megatron)


def test_blocks_rise_and_unused_slots_stay_last():
    blocks = torch.tensor([[[7, 2, 5], [0, -1, -1], [3, 1, -1]]], dtype=torch.int32)
    assert compact(blocks).tolist() == [[[2, 5, 7], [0, -1, -1], [1, 3, -1]]]


def test_overlap_counts_common_blocks_of_neighbours_and_no_unused_slots():
    blocks = torch.tensor([[[0, -1, -1], [1, 0, -1], [2, 1, 0]]], dtype=torch.int32)
    assert overlap(blocks) == (1 + 2) / 2


def test_the_rope_base_is_that_of_the_last_step_taken():
    phases = {"a": {"rope_base": 1.0}, "b": {"rope_base": 2.0}}
    for phase, samples, expected in ((0, 8, 1.0), (1, 0, 1.0), (1, 8, 2.0), (2, 0, 2.0)):
        assert rope_base({"progress": {"phase": phase, "samples": samples}, "phases": phases}) == expected
