"""Any layout trains the same model: every line of `layouts.LAYOUTS` against one rank, over gloo.

The small model has packed documents and a MoE with a strong balance loss. The layouts form a ring of checkpoints: each
goes on from the one that the layout before it wrote, the first from that of one rank, and one rank from the last.
"""

from pathlib import Path

import numpy as np
import pytest
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.conftest import run_processes
from tests.parallel.layouts import FULL, LAYOUTS, Trained, ring

STEPS = 5
LEARNING_RATE = 1e-3
NAMES = [name for layouts in LAYOUTS.values() for name in layouts]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]  # the first one trains all layouts


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, list[Trained]]:
    """What each rank of each layout returned."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def run(ranks: int, layouts: dict[str, dict], source, name: str):
        per_rank = run_processes(ring, ranks, layouts, source, folder / name, STEPS, LEARNING_RATE)
        last = folder / name / f"layout{len(layouts) - 1}" / f"step-{STEPS:08d}"
        return {layout: [results[layout] for results in per_rank] for layout in layouts}, last

    own = folder / "one" / "layout0" / f"step-{STEPS:08d}"
    found, source = run(1, {"one rank": FULL}, own, "one")
    for ranks, layouts in LAYOUTS.items():
        more, source = run(ranks, layouts, source, f"{ranks} ranks")
        found |= more
    closed, _ = run(1, {"one rank again": FULL}, source, "closed")
    return found | closed


@pytest.mark.parametrize("layout", NAMES)
def test_a_layout_gives_the_losses_and_gradient_norms_of_one_rank(runs, layout):
    [one] = runs["one rank"]
    for rank in runs[layout]:
        assert_close(rank.fresh, one.fresh)


@pytest.mark.parametrize("layout", NAMES)
def test_a_layout_gives_the_gradient_of_every_parameter(runs, layout):
    [one] = runs["one rank"]
    expected = _joined(one.gradients)
    seen = {name: np.zeros_like(tensor, dtype=bool) for name, tensor in expected.items()}
    for rank in runs[layout]:
        for (name, offset), found in rank.gradients.items():
            part = tuple(slice(start, start + size) for start, size in zip(offset, found.shape, strict=True))
            error = np.linalg.norm(found - expected[name][part]) / np.linalg.norm(expected[name])
            assert error < 1e-5, f"{name} at {offset}: {error:.1e}"  # FP32 sums in another order
            seen[name][part] = True
    assert all(part.all() for part in seen.values())


@pytest.mark.parametrize("layout", NAMES)
def test_a_layout_counts_all_rows_of_every_expert(runs, layout):
    [one] = runs["one rank"]
    for rank in runs[layout]:
        assert (rank.load.sum(1) == one.load.sum(1)).all()
        assert np.abs(rank.load - one.load).max() <= 2  # a token between two experts may fall to either


@pytest.mark.parametrize("layout", [*NAMES, "one rank again"])
def test_a_checkpoint_goes_on_under_the_next_layout(runs, layout):
    """Five steps, not one: Adam's states and its step count show only from the second step on."""
    [one] = runs["one rank"]
    for rank in runs[layout]:
        assert_close(rank.resumed, one.resumed)


@pytest.mark.parametrize("layout", NAMES)
def test_a_checkpoint_holds_what_that_of_one_rank_holds(runs, layout):
    """Under the same names and shapes: so what loads one of the checkpoints can load each of them."""
    [one], [first, *_] = runs["one rank"], runs[layout]
    assert "embedding.word_embeddings.weight" in _contents(one.saved)
    assert _contents(first.saved) == _contents(one.saved)


def _contents(checkpoint: Path) -> dict[str, tuple | None]:
    """Shape and dtype of each tensor by name; None for what is no tensor."""
    described = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    return {
        name: (tuple(x.size), x.properties.dtype) if isinstance(x, TensorStorageMetadata) else None
        for name, x in described.items()
    }


def _joined(shards: dict) -> dict[str, np.ndarray]:
    """One rank's gradients by name; a weight that is described in parts, such as gate and up, is put together."""
    names = {name for name, _ in shards}
    parts = {name: sorted(offset for other, offset in shards if other == name) for name in names}
    return {name: np.concatenate([shards[name, offset] for offset in parts[name]]) for name in names}


def assert_close(ours: list, expected: list) -> None:
    """At a learning rate at which Adam's sign-like updates do not magnify what sums in another order differ by."""
    for step, (mine, theirs) in enumerate(zip(ours, expected, strict=True)):
        assert mine == pytest.approx(theirs, rel=1e-5), f"step {step}"


def assert_same(ours: list, expected: list) -> None:
    for step, (mine, theirs) in enumerate(zip(ours, expected, strict=True)):
        # FP32 sums in another order; Adam's sign-like updates at a learning rate of 0.01 magnify them step by step
        assert mine == pytest.approx(theirs, rel=1e-5 * 10**step), f"step {step}"
