"""Context parallelism of the model: every variant against one rank, and what travels between ranks for it.

Losses over steps, gradients and checkpoints of whole layouts are in `test_layouts.py`.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hysparse.choices import Gate, Kernels, Recompute
from hysparse.config import Config
from hysparse.estimate import Cluster, Layout
from hysparse.plan import LayerKind, Plan, pipeline_stages
from parallel.context import Context
from parallel.start import Sizes, start, stop
from tests.conftest import run_processes
from tests.models import ROPE_BASE, VARIANTS, build_model, packed_batch, small_config
from tests.parallel.layouts import make_engine

RELATIVE = 1e-5  # of a tensor's largest gradient: FP32 sums in another order, through five layers


def case(variant: str, recompute: Recompute = Recompute.none, triton: bool = False, **sizes) -> Config:
    config = small_config(variant, recompute=recompute, **sizes)
    if triton:
        config.kernels, config.attention.block, config.attention.tokens = Kernels.triton, 16, 32
    return config


CASES = {  # FSSSF, and FSSF through Triton's interpreter
    **{variant: case(variant) for variant in VARIANTS},
    **{f"{variant}, recomputed": case(variant, Recompute.full) for variant in VARIANTS},
    "hysparse, attention recomputed": case("hysparse", Recompute.selective),
    "hysparse, gates per channel": case("hysparse"),
    "hysparse, Triton": case("hysparse", triton=True, layers=4, ratio=2),
    "hysparse_own_kv, Triton": case("hysparse_own_kv", triton=True, layers=4, ratio=2),
}
CASES["hysparse, gates per channel"].model.qk_norm = True
CASES["hysparse, gates per channel"].attention.gate = Gate.elementwise


@contextmanager
def counted(group: dist.ProcessGroup) -> Iterator[Counter]:
    """How often each collective of `group` is called, and under "bytes NAME" what this rank sends to others in it."""
    counts, originals = Counter(), {}

    def sent(name: str, output: torch.Tensor, x: torch.Tensor, sizes: list[int] | None = None, *_) -> int:
        if name == "all_to_all_single":
            return (sum(sizes) - sizes[group.rank()]) * x[:1].nbytes
        return max(output.nbytes, x.nbytes) * (group.size() - 1) // group.size()  # of a ring

    def wrap(name: str):
        original = originals[name] = getattr(dist, name)

        def call(*arguments, **keywords):
            if keywords.get("group") is group:
                counts[name] += 1
                counts[f"bytes {name}"] += sent(name, *arguments)
            return original(*arguments, **keywords)

        return call

    for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single"):
        setattr(dist, name, wrap(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def losses_and_gradients(config: Config, context: Context) -> tuple[dict[str, np.ndarray], Counter]:
    """Of one packed batch: each token's loss and the gradient of their sum by every parameter; and what travelled."""
    model = build_model(config).train()
    batch = {name: context.part(x, 1) for name, x in packed_batch(config).items()}
    with counted(context.group) as counts:
        loss = model(batch["tokens"], batch["document_start"], ROPE_BASE, batch["labels"])
        (loss * batch["loss_mask"]).sum().backward()
    whole = torch.zeros(len(loss), loss.shape[1] * context.size)
    whole[:, context.places(loss.shape[1], loss.device)] = loss.detach()
    found = {"loss": whole} | {name: parameter.grad for name, parameter in model.named_parameters()}
    for x in found.values():
        dist.all_reduce(x, group=context.group)  # as Megatron does with gradients; losses of other ranks' tokens are 0
    return {name: x.numpy() for name, x in found.items()}, counts  # tensors would die with their process


def all_cases(size: int) -> dict[str, tuple]:
    start(Sizes(context=size))
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    context = Context(parallel_state.get_context_parallel_group())
    found = {}
    for name, config in CASES.items():
        config.parallel.context = size
        found[name] = losses_and_gradients(config, context)
    stop()
    return found


@pytest.fixture(scope="module")
def runs() -> tuple:
    """What one rank finds, and each of two."""
    return *run_processes(all_cases, 1, 1), *run_processes(all_cases, 2, 2)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_give_the_losses_and_gradients_of_one(runs, name):
    (expected, nothing), *ranks = (run[name] for run in runs)
    assert len(expected) > 20 and not nothing
    for found, _ in ranks:
        assert found.keys() == expected.keys()
        for key, truth in expected.items():
            error = np.abs(found[key] - truth).max() / max(np.abs(truth).max(), 1e-6)
            assert error < RELATIVE, f"{key}: relative error {error:.1e}"


@pytest.mark.parametrize(
    "name, gathers, scatters, halos",
    [  # two full layers and three others; each halo once forward and once backward
        ("hysparse", 2, 2, 6),
        ("hysparse_shared_swa", 2, 2, 0),
        ("hybrid_swa", 2, 2, 6),
        ("hysparse_own_kv", 5, 5, 0),  # any token may select any of a layer's own keys
        ("hysparse_no_swa", 5, 5, 0),
        ("full", 5, 5, 0),
        ("hysparse, attention recomputed", 2, 2, 6),
        # the last full layer, which nobody reads, gathers again; the first takes over what its readers hold
        ("hysparse, recomputed", 3, 2, 9),
        ("hysparse_shared_swa, recomputed", 3, 2, 0),
    ],
)
def test_a_hybrid_block_gathers_k_and_v_once_and_reduces_their_gradients_once(runs, name, gathers, scatters, halos):
    for run in runs[1:]:
        counts = run[name][1]
        calls = tuple(counts[key] for key in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single"))
        assert calls == (gathers, scatters, halos)


def block_of_80b(cases: list[tuple]) -> list[tuple[int, float]]:
    """For each (variant, recompute, rank, ranks): the bytes that a rank sends for one hybrid block of the 80B at 32,768
    tokens, counted in a world of tensors without memory; and the estimate.
    """
    from megatron.core import parallel_state

    from hysparse import dry_run
    from parallel.fake import fake_rank

    results = []
    for variant, recompute, rank, ranks in cases:
        config = small_config(variant, moe=False, layers=12, ratio=11 * (variant != "full"), context=ranks)
        config.attention.last_full, config.parallel.recompute = False, recompute
        config.attention.block, config.attention.tokens, config.attention.window = 64, 1024, 128
        config.model.heads, config.model.kv_heads, config.model.head_dim = 64, 4, 128
        config.phases["only"].sequence_length = 32768
        phase, plan = config.phases["only"], Plan(config.model, config.attention)
        stages, operators = pipeline_stages(config, plan), dry_run._operators(config)
        with fake_rank(rank, ranks, Sizes(context=ranks)):
            chunks = dry_run._build(config, stages, operators)
            with counted(parallel_state.get_context_parallel_group()) as counts:
                dry_run._run(config, phase, phase.sequence_length, chunks, "the only chunk")
        layout = Layout(config, plan, stages, Cluster(ranks))
        estimate = sum(plan.count(kind) * layout.context_bytes(kind, recompute, phase) for kind in LayerKind)
        results.append((sum(count for key, count in counts.items() if key.startswith("bytes")), estimate))
    return results


def test_a_block_of_the_80b_sends_a_twelfth_of_its_twin_and_the_halos():
    kv, tokens = 2 * 4 * 128 * 2, 32768  # bytes of a token: K and V of four heads in BF16
    variants = [("full", Recompute.none), ("hysparse", Recompute.none), ("hysparse", Recompute.full)]
    places = {(0, 2): 1, (3, 8): 2}  # rank and ranks: neighbours
    [results] = run_processes(block_of_80b, 1, [(*variant, *place) for place in places for variant in variants])
    for (_, ranks), neighbours, (twin, found, recomputed) in zip(
        places, places.values(), (results[:3], results[3:]), strict=True
    ):
        gathered = tokens * kv * (ranks - 1) // ranks
        halos = 11 * 127 * kv * neighbours
        assert twin[0] == twin[1] == 12 * 2 * gathered  # each layer gathers, and reduces the gradients
        assert found[0] == 2 * gathered + 2 * halos
        assert recomputed[0] == 2 * gathered + 3 * halos
        if neighbours == 2:  # what is estimated
            assert (found[0], recomputed[0]) == (found[1], recomputed[1])


def evaluated(context: int) -> list[list[float]]:
    config = small_config(context=context)
    engine = make_engine(config)
    totals = engine.evaluate([packed_batch(config, seed=seed) for seed in (0, 1)], buckets=8, rope_base=ROPE_BASE)
    stop()
    return totals.tolist()


def test_the_loss_by_position_counts_from_the_start_of_the_sequence_on_all_ranks():
    [expected] = run_processes(evaluated, 1, 1)
    for totals in run_processes(evaluated, 2, 2):
        np.testing.assert_allclose(totals, expected, rtol=1e-5)  # FP32 sums in another order
