"""What the processes of the DeepSpeed tests run: the small model under both engines, from the same weights."""

from pathlib import Path

from data import micro_batches
from hysparse.choices import Recompute
from hysparse.config import PhaseConfig
from hysparse.schedule import learning_rate
from parallel import checkpoint
from parallel.engines import AdamW, Engine, Step, Zero, make_engine
from parallel.start import Sizes, start
from tests.models import ROPE_BASE, build_model, packed_batch, small_config

ADAMW = AdamW(beta1=0.9, beta2=0.95, epsilon=1e-10, weight_decay=0.1, clip=1.0)
TOKENS = 20 * 4 * 64
PHASE = PhaseConfig(  # 20 steps of 4 sequences, one a micro-batch
    tokens=TOKENS,
    sequence_length=64,
    global_batch=4,
    learning_rate=1e-2,
    warmup_tokens=TOKENS // 4,
    decay_tokens=TOKENS // 4,
)
MEGATRON = "megatron"
ENGINES = {
    MEGATRON: {},
    "ZeRO 1": {"zero": 1},
    "ZeRO 2": {"zero": 2},
    "ZeRO 3": {"zero": 3},
    "ZeRO 2, optimizer on the CPU": {"zero": 2, "offload_optimizer": "cpu"},
    "ZeRO 3, all on the CPU": {"zero": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
}


class Rows:
    """Samples as the data pipeline gives them: four packed sequences a step."""

    def __getitem__(self, number: int) -> dict:
        rows = packed_batch(small_config(), rows=4, seed=number // 4)
        return {name: tensor[number % 4] for name, tensor in rows.items()}


def make(name: str, device, recompute: Recompute = Recompute.none, **more) -> Engine:
    from hysparse.model import transformer_config
    from hysparse.trainer import forward

    config = small_config(recompute=recompute)

    def build(transformer, pre, post, vp_stage):
        return build_model(config, pre=pre, post=post, transformer=transformer, vp_stage=vp_stage)

    framework = MEGATRON if name == MEGATRON else "deepspeed"
    zero = Zero(**ENGINES.get(name, {}), **more)
    return make_engine(framework, zero, transformer_config(config, [], False), build, forward, ADAMW, device)


def train(engine: Engine, steps: range) -> list[Step]:
    from megatron.core import parallel_state

    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return [
        engine.step(
            micro_batches(Rows(), 4 * step, 4, rank, ranks, 1), learning_rate(PHASE, 4 * step), rope_base=ROPE_BASE
        )
        for step in steps
    ]


def side_by_side(names: list[str], steps: int, recompute: Recompute = Recompute.none) -> dict:
    """Of each engine: its steps, an evaluation half-way, and how many weights the rank holds in the end."""
    device = start(Sizes())
    results = {}
    for name in names:
        engine = make(name, device, recompute)
        before = train(engine, range(steps // 2))
        evaluation = engine.evaluate([packed_batch(small_config(), seed=99)], 4, rope_base=ROPE_BASE)
        after = train(engine, range(steps // 2, steps))
        weights = sum(parameter.numel() for parameter in engine.modules[0].parameters())
        results[name] = before + after, evaluation.tolist(), weights
    return results


def switched(pairs: list[tuple[str, str]], folder: Path, more: dict) -> dict:
    """Of each writer: what it trains after the checkpoint of step 3; of each pair what the reader makes of that."""
    device = start(Sizes())
    results = {}
    for writer in dict.fromkeys(writer for writer, _ in pairs):
        engine = make(writer, device, **more)
        train(engine, range(3))
        checkpoint.save(folder / writer, 3, engine.state(), {})
        results[writer] = train(engine, range(3, 7))
    for writer, reader in pairs:
        engine = make(reader, device, **more)
        path = folder / writer / "step-00000003"
        engine.load_state(checkpoint.load(path, lambda engine=engine: engine.state(is_loading=True)))
        results[writer, reader] = train(engine, range(3, 7))
    return results


def values_on_the_host(name: str) -> dict[str, int]:
    """What an optimizer on the CPU holds on this rank after a step of two micro-batches, pinned on a GPU and not; of
    these, how many would be BF16."""
    engine = make(name, start(Sizes()))
    train(engine, range(1))
    zero, states = engine.engine.optimizer, list(engine.adam.state.values())
    moments = [state[moment] for state in states for moment in ("exp_avg", "exp_avg_sq")]
    weights = engine._flat_partitions()
    gradients = [weight.grad for weight in weights]
    if ENGINES[name]["zero"] == 3:
        pinned, plain, bf16 = [*gradients, zero.grad_partitions_flat_buffer], weights, []
    else:
        pinned, plain = [*weights, *gradients], []
        bf16 = [*zero.param_buffer_of_bit16_for_cpu_offload_groups, *zero.accumulated_grads_in_cpu.values()]
    if "offload_parameters" in ENGINES[name]:
        bf16 += zero.param_groups_fp16_flat_cpu_memory
    return {
        kind: sum(tensor.numel() for tensor in tensors)
        for kind, tensors in (("plain", moments + plain), ("pinned", pinned), ("bf16", bf16))
    }
