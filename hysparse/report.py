"""The text of `plan=true`: what is about to be trained, in plain lines that fit a terminal of 80 columns or a file.

Only layout lives here. Quantities come from `plan.py`, stages from `parallel/placement.py`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import astuple
from itertools import groupby

from hysparse.config import Config, ParallelConfig, PhaseConfig
from hysparse.estimate import Cluster, HostMemory, Layout, offloaded
from hysparse.plan import BACKWARD, LayerFlops, LayerKind, Plan, TokenFlops
from parallel.placement import BALANCED, balanced_stages, imbalance


def plan_report(config: Config, plan: Plan, placement: Sequence[range], ranks: int | None = None) -> str:
    """The whole plan as text.

    `placement` holds the layers of each stage as `parallel.placement.place` returns them, on pipeline x virtual stages;
    `ranks` is the number of processes, where it is known.
    """
    lengths = sorted({phase.sequence_length for phase in config.phases.values()})
    return "\n\n".join(
        "\n".join(lines)
        for lines in (
            [f"{config.model.name}, attention {config.attention.name}: {plan.compressed_pattern}"],
            [
                f"Layers: {config.model.layers}, {len(plan.blocks)} of them full; share of the FLOPs at each length",
                *_layers(config.parallel, plan, placement, lengths),
            ],
            [
                f"Parameters: {count(plan.parameters())} in total, {count(plan.active_parameters())} active "
                f"({count(plan.embedding_parameters())} in embedding and head)"
            ],
            [f"Training FLOPs per token: {1 + BACKWARD} × forward, recomputation not counted", *_flops(plan, lengths)],
            ["KV cache of a sequence in BF16, and with all layers full", *_kv_cache(plan, lengths)],
            ["Phases", *_phases(config.phases)],
            [
                "Parallel layout",
                *_layout(config.parallel, plan, placement, lengths, ranks),
                *_host_memory(config, plan, placement, ranks),
            ],
        )
    )


def count(x: float) -> str:
    """A number in thousands, millions, billions or trillions: "7.621 B"."""
    return _scaled(x, 1000, ("", "K", "M", "B", "T"))


def bytes_(x: float) -> str:
    """Bytes in binary units: "1.25 GiB"."""
    return _scaled(x, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def flops(x: float) -> str:
    """Floating-point operations, not per second: "57.3 GFLOP"."""
    return _scaled(x, 1000, ("FLOP", "KFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP", "YFLOP"))


def host_memory(host: HostMemory) -> str:
    """What takes host memory of a node, in words."""
    states = f"up to {bytes_(host.optimizer)} offloaded, " if host.optimizer else ""
    return f"{states}{bytes_(host.checkpoint)} to save a checkpoint"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns two spaces apart, the first flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for first, *others in (header, *rows):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def _layers(parallel: ParallelConfig, plan: Plan, placement: Sequence[range], lengths: Sequence[int]) -> list[str]:
    """One row a hybrid block; neighbours without sparse layers share a row as long as they share a stage."""
    stage_of = {layer: stage for stage, layers in enumerate(placement) for layer in layers}
    shown = sorted({lengths[0], lengths[-1]})  # more would not fit
    costs = [plan.layer_costs(length) for length in shown]
    totals = [plan.flops_per_token(length).forward for length in shown]

    def place(stage: int) -> list[str]:
        chunk, rank = divmod(stage, parallel.pipeline)
        return [str(rank), str(chunk)] if parallel.virtual > 1 else [str(rank)]

    def shares(forward: Iterable[float]) -> list[str]:
        return [f"{cost / total:.1%}" for cost, total in zip(forward, totals, strict=True)]

    def row_of(item: tuple[int, range]) -> tuple[int, int | None]:
        number, block = item
        return stage_of[block.start], number if len(block) > 1 else None

    embedding = plan.embedding_parameters() // 2
    rows = [["embedding", "", "", "", *place(0), count(embedding), *shares([0] * len(shown))]]
    for (stage, _), run in groupby(enumerate(plan.blocks), row_of):
        numbers, blocks = zip(*run, strict=True)
        layers = range(blocks[0].start, blocks[-1].stop)
        weights = sum(plan.layer_parameters(plan.layers[i].kind, plan.model.is_dense(i)).total for i in layers)
        full = [block.start for block in blocks]
        names = [_spans(numbers), _spans(layers), _spans(full), str(len(layers) - len(full))]
        rows.append([*names, *place(stage), count(weights), *shares(sum(c[layers.start : layers.stop]) for c in costs)])
    head = [count(embedding + plan.model.hidden), *shares([plan.head_flops()] * len(shown))]
    rows.append(["norm, head", "", "", "", *place(len(placement) - 1), *head])
    stages = ["stage", "chunk"] if parallel.virtual > 1 else ["stage"]
    return table(["block", "layers", "full", "sparse", *stages, "weights", *(f"at {n:,}" for n in shown)], rows)


def _flops(plan: Plan, lengths: Sequence[int]) -> list[str]:
    def row(length: int, name: str, part: LayerFlops, total: float) -> list[str]:
        return [f"{length:,}", name, *(flops((1 + BACKWARD) * x) for x in (*astuple(part), total))]

    def model(length: int, name: str, cost: TokenFlops) -> list[str]:
        both = map(sum, zip(astuple(cost.full), astuple(cost.sparse), strict=True))
        return row(length, name, LayerFlops(*both), cost.forward)

    rows = []
    for length in lengths:
        cost = plan.flops_per_token(length)
        rows.append(row(length, f"{plan.count(LayerKind.full)} full", cost.full, cost.full.total))
        if plan.count(LayerKind.sparse):
            rows.append(row(length, f"{plan.count(LayerKind.sparse)} sparse", cost.sparse, cost.sparse.total))
        rows.append([f"{length:,}", "LM head", "", "", "", flops((1 + BACKWARD) * cost.head)])
        rows.append(model(length, "model", cost))
        if plan.count(LayerKind.sparse):
            rows.append(model(length, "all full", plan.full_attention_twin().flops_per_token(length)))
    return table(["length", "layers", "projections", "attention", "FFN", "sum"], rows)


def _kv_cache(plan: Plan, lengths: Sequence[int]) -> list[str]:
    twin = plan.full_attention_twin()
    rows = []
    for n in lengths:
        sizes = [bytes_(x) for p in (plan, twin) for x in (p.kv_bytes(n), p.kv_bytes_per_token(n))]
        rows.append([f"{n:,}", *sizes, f"{twin.kv_bytes(n) / plan.kv_bytes(n):.2f} ×"])
    return table(["length", "sequence", "per token", "all full", "per token", "smaller by"], rows)


def _phases(phases: dict[str, PhaseConfig]) -> list[str]:
    """One column a phase."""

    def decay(phase: PhaseConfig) -> str:
        return f"{phase.decay_shape} to {phase.minimum_learning_rate:g}" if phase.decay_tokens else "none"

    described = {
        "tokens": lambda phase: count(phase.tokens),
        "steps": lambda phase: f"{phase.steps:,}",
        "sequence length": lambda phase: f"{phase.sequence_length:,}",
        "sequences per step": lambda phase: f"{phase.global_batch:,}",
        "tokens per step": lambda phase: count(phase.tokens_per_step),
        "peak learning rate": lambda phase: f"{phase.learning_rate:g}",
        "warm-up tokens": lambda phase: count(phase.warmup_tokens),
        "decay tokens": lambda phase: count(phase.decay_tokens),
        "decay": decay,
        "RoPE base": lambda phase: f"{phase.rope_base:,.0f}",
    }
    return table(["", *phases], [[name, *map(text, phases.values())] for name, text in described.items()])


def _layout(
    parallel: ParallelConfig, plan: Plan, placement: Sequence[range], lengths: Sequence[int], ranks: int | None
) -> list[str]:
    model = parallel.tensor * parallel.pipeline * parallel.context
    data = f"data {ranks // model} = {ranks} ranks" if ranks else f"data (ranks / {model})"
    lines = [f"tensor {parallel.tensor} × pipeline {parallel.pipeline} × context {parallel.context} × {data}"]
    if parallel.tensor > plan.model.kv_heads:
        lines.append(f"{parallel.tensor // plan.model.kv_heads} tensor-parallel ranks share a KV head")
    if parallel.virtual > 1:
        lines.append(f"virtual {parallel.virtual}: chunks of the model on each pipeline stage")
    if parallel.context > 1:
        parts = ", ".join(f"{length // parallel.context:,} of {length:,}" for length in lengths)
        lines.append(f"context {parallel.context}: {parts} tokens of a sequence on each rank, in two chunks")
    if moe := plan.model.moe:
        held = moe.experts // parallel.expert
        lines.append(f"expert {parallel.expert}: {held} of {moe.experts} experts on each rank")
    if share := parallel.offload_optimizer:
        lines.append(f"{share:.0%} of master weights and Adam's states in host memory, updated there")
    if len(placement) > 1:
        lines += _stages(parallel, plan, placement, lengths)
    return lines


def _host_memory(config: Config, plan: Plan, placement: Sequence[range], ranks: int | None) -> list[str]:
    """Of a node where the number of ranks is known, else what is offloaded on all nodes; nothing below 1 GiB."""
    if ranks is None:
        size = offloaded(config)[1] * plan.parameters()
        return [f"host memory of all nodes: up to {bytes_(size)} offloaded"] if size >= 2**30 else []
    cluster = Cluster(ranks)
    host = Layout(config, plan, placement, cluster).host_memory()
    if host.total < 2**30:
        return []
    return [f"host memory, {min(cluster.node, ranks)} ranks: {host_memory(host)}"]


def _stages(parallel: ParallelConfig, plan: Plan, placement: Sequence[range], lengths: Sequence[int]) -> list[str]:
    """Each stage, or chunk of one, with its cost over the mean, and how many stages would be balanced."""
    head = plan.head_flops()
    costs = {length: plan.layer_costs(length) for length in sorted({lengths[0], lengths[-1]})}
    rows = []
    for number, layers in enumerate(placement):
        chunk, stage = divmod(number, parallel.pipeline)
        blocks = sum(block.start in layers for block in plan.blocks)
        row = [str(stage), str(chunk), _spans(layers), str(blocks)]
        for cost in costs.values():
            own = sum(cost[layers.start : layers.stop]) + head * (number == len(placement) - 1)
            row.append(f"{own * len(placement) / (sum(cost) + head):.2f} ×")
        rows.append(row)
    lines = table(["stage", "chunk", "layers", "blocks", *(f"at {length:,}" for length in costs)], rows)
    for length, cost in costs.items():
        found = imbalance(placement, cost, last_cost=head)
        advice = ""
        if found > BALANCED:
            good = _spans(balanced_stages(plan.block_sizes, cost, last_cost=head))
            advice = f"; better on {good} stages"
        lines.append(f"costliest of {len(placement)} stages at {length:,}: {found:.2f} × the mean{advice}")
    return lines


def _scaled(x: float, step: int, units: Sequence[str]) -> str:
    """Four significant digits, in the unit that keeps them below `step`."""
    power = 0
    while float(f"{x:.4g}") >= step and power < len(units) - 1:
        x, power = x / step, power + 1
    return f"{x:.4g} {units[power]}".strip()


def _spans(numbers: Iterable[int]) -> str:
    """Rising numbers with neighbours joined: "1-3, 5"."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda item: item[1] - item[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
