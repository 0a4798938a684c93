"""Each rank's share of the optimizer in a checkpoint; that any layout can go on from it is in test_layouts.py."""

from pathlib import Path

import pytest
import torch

from parallel import checkpoint
from parallel.shares import boxes
from tests.conftest import run_processes
from tests.parallel.layouts import config_of, make_engine, train


@pytest.mark.parametrize("shape", [(7,), (3, 5), (4, 1), (2, 3, 4), (3, 1, 2, 5)])
def test_boxes_are_exactly_the_range_in_its_order_and_few(shape):
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for start in range(whole.numel()):
        for stop in range(start + 1, whole.numel() + 1):
            cut = list(boxes(start, stop, shape))
            parts = [whole[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))] for box in cut]
            assert torch.equal(torch.cat([part.flatten() for part in parts]), torch.arange(start, stop))
            assert len(cut) <= 2 * len(shape) - 1


def beside_megatron(folder: Path) -> dict:
    """Steps of two data-parallel ranks, and those steps again from the checkpoint before them: ours, and one in
    Megatron's format, which gathers; with the numbers that this rank held for them."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    config = config_of({"micro_batch": 2})
    engine = make_engine(config)
    train(engine, config, 2)
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    metadata |= {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
    model = {"model0": engine.modules[0].sharded_state_dict(metadata=metadata)}
    gathered = model | {"optimizer": engine.optimizer.sharded_state_dict(model, metadata=metadata)}
    states, steps, numbers = {"ours": engine.state(), "Megatron's": gathered}, {}, {}
    for name, state in states.items():
        tensors = (
            entry.data for entry in nested_values(state["optimizer"]) if torch.is_tensor(getattr(entry, "data", 0))
        )
        numbers[name] = sum(tensor.numel() for tensor in tensors)
        states[name] = checkpoint.save(folder / name, 2, state, {})
    steps["without"] = train(engine, config, 2)
    for name, path in states.items():
        engine.load_state(checkpoint.load(path, lambda: engine.state(is_loading=True)))
        steps[name] = train(engine, config, 2)
    return {"steps": steps, "numbers": numbers}


def test_a_share_is_read_from_megatrons_format_and_ours_alike_and_nothing_more_is_held_for_it(tmp_path):
    for rank in run_processes(beside_megatron, 2, tmp_path):
        assert rank["steps"]["ours"] == rank["steps"]["Megatron's"] == rank["steps"]["without"]
        assert rank["numbers"]["ours"] == pytest.approx(rank["numbers"]["Megatron's"] / 2, rel=0.01)
