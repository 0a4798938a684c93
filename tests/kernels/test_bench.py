"""What the benchmark feeds the kernels, and how it counts."""

import numpy
import pytest
import torch

from kernels import bench_inputs, roofline
from kernels.bench_inputs import BLOCK, SELECTED, SELECTIONS, Case, causal_pairs, document_starts, selected_pairs
from tests.kernels.cases import starts


@pytest.fixture
def capture(monkeypatch, tmp_path):
    """A capture of one KV head and 1,024 tokens, each of which chose its own block and the one before."""
    monkeypatch.setattr(bench_inputs, "DEVICE", "cpu")
    monkeypatch.setattr(bench_inputs, "CAPTURE", tmp_path / "blocks.npz")
    own = numpy.arange(1024) // BLOCK
    blocks = numpy.full((1, 1024, SELECTED), -1, dtype=numpy.int16)
    blocks[0, :, 0], blocks[0, :, 1] = own, own - 1
    numpy.savez(bench_inputs.CAPTURE, blocks=blocks)


@pytest.mark.parametrize("kind", SELECTIONS)
@pytest.mark.parametrize("length", [70, 2500])
def test_selections_are_distinct_visible_blocks_with_the_unused_slots_last(kind, length, capture):
    blocks = SELECTIONS[kind](Case("80b", length))
    assert blocks.shape == (1, 4, length, SELECTED) and blocks.dtype == torch.int32
    for chosen, token in zip(blocks[0, 1].tolist(), range(length), strict=True):
        used = [block for block in chosen if block >= 0]
        assert chosen == used + [-1] * (SELECTED - len(used))
        assert len(set(used)) == len(used) and used and max(used) <= token // BLOCK
        if kind != "captured":
            assert len(used) == min(SELECTED, token // BLOCK + 1)


def test_a_short_capture_repeats_within_itself(capture):
    blocks = SELECTIONS["captured"](Case("7b", 2500))
    assert blocks[0, 7, 1023, :2].tolist() == [15, 14]
    assert blocks[0, 7, 1024, :2].tolist() == [16, -1]  # sees nothing of the first repetition
    assert blocks[0, 7, 2200, :2].tolist() == [34, 33]


def test_pairs_are_counted_as_a_loop_over_tokens_does(capture):
    blocks = SELECTIONS["random"](Case("80b", 300))
    loop = sum(
        max(0, min((block + 1) * BLOCK, t + 1) - block * BLOCK)
        for head in blocks[0].tolist()
        for t, chosen in enumerate(head)
        for block in chosen
        if block >= 0
    )
    assert selected_pairs(blocks) == loop
    assert causal_pairs(300) == sum(t + 1 for t in range(300)) == loop // 4  # all blocks are chosen
    assert causal_pairs(300, 128) == sum(min(t + 1, 128) for t in range(300))
    assert causal_pairs(20, 128) == 210


def test_packed_documents_fill_the_sequence(monkeypatch):
    monkeypatch.setattr(bench_inputs, "DEVICE", "cpu")
    lengths = Case("80b", 8192).packed_documents()
    assert len(lengths) == 8 and min(lengths) > 0 and sum(lengths) == 8192
    assert torch.equal(document_starts(lengths), starts([lengths]))


def test_a_target_knows_which_way_is_better():
    assert roofline.Target("speed", 1.6, 1.5, 2.0).mark == "floor"
    assert roofline.Target("speed", 2.0, 1.5, 2.0).mark == "goal"
    assert roofline.Target("speed", 1.4, 1.5, 2.0).mark == "MISSED"
    assert roofline.Target("cost", 2.0, 10, 3, unit="%").mark == "goal"
    assert roofline.Target("cost", 4.0, 10, 3, unit="%").mark == "floor"
    assert roofline.Target("cost", 11.0, 10, 3, unit="%").mark == "MISSED"


def test_a_table_has_the_columns_that_some_row_fills():
    peer = roofline.Row("full", "peer", "80b", 8192, ms=3.0, flops=6e12, bytes=3e9)
    row = roofline.Row("full", "ours", "80b", 8192, ms=2.0, flops=6e12, bytes=3e9)
    row.compare(peer, 1.2, 1.5)
    head, rule, first, second = roofline.table([peer, row]).splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == [
        *("operator", "shape", "length", "ms", "TFLOP/s", "GB/s", "against (floor, goal)")
    ]
    assert len({len(line) for line in (head, rule, first, second)}) == 1
    assert "1.50× the speed of peer (1.2, 1.5): goal" in second and "3000" in second
