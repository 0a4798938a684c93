"""Estimates against numbers counted by hand, and against what must hold whatever the rates are.

That the weights of every stage are exact is checked by the dry runs, which build them.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from hysparse.choices import Recompute
from hysparse.estimate import DENSE, Cluster, Layout
from hysparse.plan import Plan, pipeline_stages
from tests.models import small_config


def layout_of(config, ranks: int, **cluster) -> Layout:
    plan = Plan(config.model, config.attention)
    return Layout(config, plan, pipeline_stages(config, plan), Cluster(ranks, **cluster))


@pytest.mark.parametrize("micro_batch, tensor, context", [(1, 1, 1), (1, 4, 1), (4, 2, 1), (2, 1, 4)])
def test_the_buffers_of_the_sparse_kernels_are_as_large_as_the_kernels_make_them(micro_batch, tensor, context):
    """The 80B's heads at 32K, by the functions that the backward pass sizes its buffers with."""
    sparse_forward = pytest.importorskip("kernels.sparse_forward")
    from kernels.selection import index_shapes

    S, K, group, D, block, n = 32768, 4, 16, 128, 64, 16
    config = small_config(tensor=tensor, context=context)
    config.model.heads, config.model.kv_heads, config.model.head_dim = K * group, K, D
    config.attention.block, config.attention.tokens = block, n * block
    phase = replace(config.phases["only"], sequence_length=S, micro_batch=micro_batch)
    heads = micro_batch * K // tensor
    queries = S if context == 1 else S // (2 * context)  # of one call
    blocks = torch.empty(micro_batch, K // tensor, queries, n, dtype=torch.int32, device="meta")
    (_, pieces) = index_shapes(blocks, block, S, group)[-1]
    each = queries * n * group * D * 2 + pieces * block * 2 * D * 4
    assert layout_of(config, tensor * context)._part_bytes(phase) == each * sparse_forward.heads_at_a_time(heads, each)


@pytest.mark.parametrize(
    "pipeline, virtual, in_flight",
    [
        (1, 1, [1]),
        (4, 1, [4, 3, 2, 1]),  # 1F1B: the first stage is four micro-batches ahead of its first backward pass
        (2, 2, [5 / 2, 3 / 2]),  # chunks in Megatron's warm-up, 2 x the later stages + pipeline, and the one at hand
    ],
)
def test_early_stages_hold_more_micro_batches(pipeline, virtual, in_flight):
    config = small_config(layers=8, ratio=2, pipeline=pipeline, virtual=virtual)
    config.phases["only"].global_batch = 16
    layout = layout_of(config, pipeline)
    assert [layout._in_flight(stage, config.phases["only"]) for stage in range(pipeline)] == in_flight


def test_weights_gradients_and_states_are_18_bytes_a_weight_on_one_rank():
    """BF16 weights 2, FP32 gradients 4, FP32 master copy and Adam's two states 12."""
    config = small_config()
    [memory] = layout_of(config, 1).memory(config.phases["only"])
    weights = Plan(config.model, config.attention).parameters()
    assert memory.weights + memory.gradients + memory.optimizer == 18 * weights


def test_what_is_offloaded_leaves_the_memory_of_the_gpu_and_takes_time():
    """Three quarters of 12 bytes a weight; nothing else changes."""
    whole, offloaded = small_config(), small_config(offload_optimizer=0.75)
    phase, weights = whole.phases["only"], Plan(whole.model, whole.attention).parameters()
    [on_gpu], [rest] = layout_of(whole, 1).memory(phase), layout_of(offloaded, 1).memory(phase)
    assert rest == on_gpu._replace(optimizer=(1 - 0.75) * 12 * weights)
    assert layout_of(offloaded, 1).step_seconds(phase) > layout_of(whole, 1).step_seconds(phase)


@pytest.mark.parametrize("ranks, node, nodes", [(1, 8, 1), (4, 8, 1), (4, 2, 2)])
def test_nodes_share_what_is_offloaded_and_what_is_written_to_a_checkpoint(ranks, node, nodes):
    """Of each weight 8 bytes of moments, and 8 of master weight and gradient that are pinned, which may double them;
    written are the moments, the master weight and the weight in BF16."""
    config = small_config(moe=False, offload_optimizer=0.75)
    weights = Plan(config.model, config.attention).parameters()
    host = layout_of(config, ranks, node=node).host_memory()
    assert host.optimizer == 0.75 * (8 + 2 * 8) * weights / nodes
    assert host.checkpoint == (8 + 4 + 2) * weights / nodes


def test_host_memory_is_that_of_the_fullest_node_and_a_node_may_hold_several_stages():
    config = small_config(layers=8, ratio=2, pipeline=2, expert=2, offload_optimizer=1.0)
    alone, together = (layout_of(config, 4, node=node).host_memory() for node in (2, 4))
    of_stage = [shared + 2 * experts for shared, experts in map(layout_of(config, 4).weights, (0, 1))]
    assert of_stage[0] < of_stage[1]  # which has the head
    assert alone.optimizer == 24 * of_stage[1] and alone.checkpoint == 14 * of_stage[1]
    assert together.optimizer == 24 * Plan(config.model, config.attention).parameters()


def test_data_parallel_ranks_share_the_optimizer_and_nothing_else():
    config = small_config(moe=False)
    phase = config.phases["only"]
    [alone], [shared] = layout_of(config, 1).memory(phase), layout_of(config, 4).memory(phase)
    assert shared.optimizer == alone.optimizer / 4
    assert shared._replace(optimizer=0) == alone._replace(optimizer=0)


def test_context_parallel_ranks_share_optimizer_and_tokens_and_all_keep_k_and_v_of_a_full_layer():
    """FSSSF: K and V of two full layers, 2 x 32 values a token, are kept of 64 tokens and not of 32."""
    one, two = small_config(moe=False), small_config(moe=False, context=2)
    phase = one.phases["only"]
    [alone], [shared] = layout_of(one, 1).memory(phase), layout_of(two, 2).memory(phase)
    assert shared.optimizer == alone.optimizer / 2 and shared.weights == alone.weights
    assert shared.activations == alone.activations / 2 + 2 * 32 * 64 * 2


def test_recomputation_trades_time_for_memory():
    found = {}
    for recompute in Recompute:
        config = small_config(recompute=recompute)
        layout, phase = layout_of(config, 1), config.phases["only"]
        found[recompute] = layout.memory(phase)[0].activations, layout.step_seconds(phase)
    none, selective, full = (found[recompute] for recompute in (Recompute.none, Recompute.selective, Recompute.full))
    assert none[0] > selective[0] > full[0]
    assert none[1] < selective[1] < full[1]


def test_the_more_layers_are_recomputed_in_full_the_less_is_kept_and_the_longer_it_takes():
    """FSSSF, from selective to full; in a pipeline the count starts again in every chunk."""
    found = []
    for parallel in ({"recompute": Recompute.selective}, *({"recompute_layers": layers} for layers in range(1, 6)), {}):
        config = small_config(**{"recompute": Recompute.full} | parallel)
        layout, phase = layout_of(config, 1), config.phases["only"]
        found.append((layout.memory(phase)[0].activations, layout.step_seconds(phase)))
    assert found[-2] == found[-1]
    for (more, shorter), (less, longer) in pairwise(found[:-1]):
        assert more > less and shorter < longer
    sizes = {"layers": 8, "ratio": 2, "pipeline": 2, "virtual": 2, "recompute": Recompute.full}  # FSS F, FSS F
    three, all_ = (small_config(**sizes, recompute_layers=layers) for layers in (3, None))
    three, all_ = (layout_of(config, 2).memory(config.phases["only"]) for config in (three, all_))
    assert three == all_


def test_full_recomputation_keeps_the_input_of_each_layer_and_what_a_block_shares():
    """FSSSF of the small model, 64 tokens: hidden 48, K and V 2 x 16 each, 3 blocks and 3 entries for 2 heads."""
    config = small_config(recompute=Recompute.full)
    [memory] = layout_of(config, 1).memory(config.phases["only"])
    assert memory.activations == 64 * (5 * 48 * 2 + 2 * 32 * 2 + 2 * 3 * 2 * 4)


def test_a_step_is_no_quicker_than_its_products_and_four_ranks_at_most_four_times_as_quick():
    config = small_config()
    phase = config.phases["only"]
    useful = Plan(config.model, config.attention).flops_per_token(phase.sequence_length).training
    one, four = layout_of(config, 1).step_seconds(phase), layout_of(config, 4).step_seconds(phase)
    assert one > useful * phase.tokens_per_step / DENSE
    assert four > one / 4
    ideal = layout_of(config, 4, nvlink=1e18).step_seconds(phase)
    assert ideal == pytest.approx(one / 4)


@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"expert": 2}, {"pipeline": 2}, {"context": 2}, {}])
def test_a_slower_link_makes_every_split_slower(sizes):
    config = small_config(layers=8, ratio=2, **sizes)
    phase = config.phases["only"]
    fast = layout_of(config, 2).step_seconds(phase)
    slow = layout_of(config, 2, nvlink=3e9).step_seconds(phase)
    assert slow > fast


def test_a_pipeline_pays_for_its_bubble_and_chunks_make_it_smaller():
    def seconds(batch: int, **sizes) -> float:
        config = small_config(layers=8, ratio=2, moe=False, pipeline=2, **sizes)
        phase = replace(config.phases["only"], global_batch=batch)
        return layout_of(config, 2, nvlink=1e18, network=1e18).step_seconds(phase)

    per_micro_batch = seconds(9) - seconds(8)
    assert seconds(8) == pytest.approx(9 * per_micro_batch)  # one more than there are
    assert seconds(8, virtual=2) < seconds(8)
