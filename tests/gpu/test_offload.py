"""An optimizer in host memory on a GPU: the same updates and checkpoints, and its memory is free.

`tests/parallel/test_offload.py` has what can be seen without a GPU.
"""

import gc

import pytest
import torch

from hysparse.linears import OLDEST_FP8
from parallel import checkpoint
from tests.models import ROPE_BASE
from tests.parallel.offloading import hybrid_optimizers, moved, states, train_beside_adamw

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

RATE = 1e-3
STATE_BYTES = 12  # of a weight: FP32 master weight and two moments
FP8 = ("precision=fp8", "model.heads=8", "model.kv_heads=4")  # widths in multiples of 16


def make(device: torch.device, share: float, precision: tuple[str, ...] = ("precision=bf16",)):
    """The engine of the tiny model as the trainer builds it, and the micro-batches of a step."""
    from hysparse.bench_engine import configuration, random_batches
    from hysparse.plan import Plan, pipeline_stages
    from hysparse.trainer import build_engine, select_operators

    config = configuration(["+experiment=tiny", *precision, f"parallel.offload_optimizer={share}"], 1)
    stages = pipeline_stages(config, Plan(config.model, config.attention))
    engine = build_engine(config, stages, select_operators(config), device)
    return engine, random_batches(config, config.phases["pretrain"], device)


def allocated() -> int:
    gc.collect()  # engines are full of cycles
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@pytest.fixture(scope="module")
def losses(megatron) -> list[float]:
    """Of five steps with the whole optimizer on the GPU."""
    engine, batches = make(megatron, 0.0)
    return [loss for loss, _ in train_beside_adamw(engine, [batches] * 5, RATE)]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_every_update_is_adamws_of_the_clipped_gradients_and_losses_follow_those_without(megatron, losses, share):
    engine, batches = make(megatron, share)
    found = [loss for loss, _ in train_beside_adamw(engine, [batches] * 5, RATE)]
    # The updates are the same to rounding in FP32; now and then a weight goes to its other neighbour in BF16
    assert found == pytest.approx(losses, rel=1e-2)
    assert found[-1] < found[0]


def test_in_fp8_updates_of_the_bf16_weights_are_the_same_and_losses_follow_those_without(megatron):
    pytest.importorskip("transformer_engine", reason="FP8 needs Transformer Engine")
    if torch.cuda.get_device_capability() < OLDEST_FP8:
        pytest.skip("this GPU has no FP8")
    engine, batches = make(megatron, 0.0, FP8)
    expected = [engine.step(batches, RATE, rope_base=ROPE_BASE).loss for _ in range(5)]
    engine, batches = make(megatron, 1.0, FP8)
    assert {parameter.dtype for parameter in engine.modules[0].parameters()} == {torch.bfloat16}
    found = [loss for loss, _ in train_beside_adamw(engine, [batches] * 5, RATE)]
    # As above, and all values of a tensor are rounded anew where its largest has changed; FP8 and BF16 differ by up to
    # 2.6 % (docs/moe.md)
    assert found == pytest.approx(expected, rel=2e-2)
    assert found[-1] < found[0]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_what_is_moved_lies_in_pinned_host_memory_and_frees_the_gpus(megatron, losses, share):
    """After `losses`, so that what the first steps allocate for good is there."""
    held = {}
    for part in (0.0, share):
        engine = batches = None  # the one before is gone when the next is counted
        before = allocated()
        engine, batches = make(megatron, part)
        engine.step(batches, RATE, rope_base=ROPE_BASE)
        held[part] = allocated() - before
    weights, _ = moved(engine)
    assert all(weight.device.type == "cpu" and weight.is_pinned() for weight in weights)
    for optimizer in hybrid_optimizers(engine):
        for part in optimizer.sub_optimizers:
            device = "cuda" if part is optimizer.gpu_optimizer else "cpu"
            assert all(tensor.device.type == device for tensors in part.state.values() for tensor in tensors.values())
    # PyTorch rounds each tensor up to 512 bytes, and small ones of a step may stay
    assert held[0.0] - held[share] == pytest.approx(STATE_BYTES * sum(map(torch.numel, weights)), rel=0.05)


@pytest.mark.parametrize("writer, reader", [(0.0, 1.0), (1.0, 0.0), (0.5, 1.0)])
def test_a_checkpoint_goes_on_with_another_share(megatron, writer, reader, tmp_path):
    (one, batches), (other, _) = make(megatron, writer), make(megatron, reader)
    for _ in range(3):
        one.step(batches, RATE, rope_base=ROPE_BASE)
    path = checkpoint.save(tmp_path, 3, one.state(), {})
    other.load_state(checkpoint.load(path, lambda: other.state(is_loading=True)))
    written = states(one)
    for name, held in states(other).items():
        assert all(torch.equal(held[part], written[name][part]) for part in held), name
    expected, found = (
        [engine.step(batches, RATE, rope_base=ROPE_BASE).loss for _ in range(4)] for engine in (one, other)
    )
    assert found == pytest.approx(expected, rel=1e-2)  # BF16, as above
