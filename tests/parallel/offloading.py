"""What tests of an offloaded optimizer look at, on CPUs and on GPUs: its states, and torch's AdamW beside it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.testing import assert_close

from tests.models import ROPE_BASE
from tests.parallel import layouts

STATES = ("param", "exp_avg", "exp_avg_sq")


def states(engine) -> dict[str, dict[str, Tensor]]:
    """Of each parameter of an engine of one rank, by name: FP32 weight and moments, flat, copied to the CPU."""
    names = {parameter: name for name, parameter in engine.modules[0].named_parameters()}
    found = {}
    for optimizer in engine.optimizer.chained_optimizers:
        for parameter in optimizer.model_param_gbuf_map:
            held = optimizer._get_main_param_and_optimizer_states(parameter)
            found[names[parameter]] = {name: held[name].detach().to("cpu", copy=True) for name in STATES}
    assert len(found) == len(names)
    return found


def hybrid_optimizers(engine) -> list:
    """Of an engine with parallel.offload_optimizer above 0: for experts, and for all other weights."""
    return [part.optimizer for part in engine.optimizer.chained_optimizers]


def moved(engine) -> tuple[list[Tensor], int]:
    """FP32 weights that were moved to host memory, and the number of values of all."""
    weights = [
        parameter
        for optimizer in hybrid_optimizers(engine)
        for part in optimizer.cpu_optimizers
        for group in part.param_groups
        for parameter in group["params"]
    ]
    return weights, sum(parameter.numel() for parameter in engine.modules[0].parameters())


def train_beside_adamw(engine, steps: Sequence[list[dict]], rate: float) -> list[tuple[float, float]]:
    """(loss, gradient norm) of steps from zero states; raises AssertionError where torch's AdamW, given the same
    gradients, comes to other weights, or the model's weights are not those rounded to its precision."""
    parameters = dict(engine.modules[0].named_parameters())
    truth = {name: torch.nn.Parameter(held["param"]) for name, held in states(engine).items()}
    groups = [
        {"params": [truth[name]], "weight_decay": 0.0 if parameter.dim() == 1 else engine.adamw.weight_decay}
        for name, parameter in parameters.items()
    ]
    betas = (engine.adamw.beta1, engine.adamw.beta2)
    adamw = torch.optim.AdamW(groups, lr=rate, betas=betas, eps=engine.adamw.epsilon, foreach=False)
    results = []
    for batches in steps:
        done = engine.step(batches, rate, rope_base=ROPE_BASE)
        results.append((done.loss, done.gradient_norm))
        for name, parameter in parameters.items():
            truth[name].grad = parameter.main_grad.detach().flatten().cpu()  # clipped in place
        adamw.step()
        for chunk in engine.chunks:  # the next forward pass would bring the model's weights up to date
            chunk.start_param_sync(force_sync=True)
        for name, held in states(engine).items():
            # FP32, in another order: some roundings of the weight, and of an update of about `rate`
            assert_close(
                held["param"], truth[name].detach(), rtol=1e-6, atol=1e-5 * rate, msg=lambda m, n=name: f"{n}: {m}"
            )
            weight = parameters[name].detach().flatten().cpu()
            assert torch.equal(weight, held["param"].to(weight.dtype)), name
    return results


def host_bytes(layout: dict) -> dict[str, int]:
    """Of one rank of the small model under a layout, after a step: bytes of what its offloaded optimizer holds, pinned
    on a GPU and not, and of what it is the first to hold of a checkpoint, as on a GPU in BF16."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica

    config = layouts.config_of(layout)
    engine = layouts.make_engine(config)
    layouts.train(engine, config, 1)
    weights, _ = moved(engine)
    moments = [
        tensor
        for optimizer in hybrid_optimizers(engine)
        for part in optimizer.cpu_optimizers
        for states in part.state.values()
        for name, tensor in states.items()
        if name in STATES
    ]
    state = engine.state()
    apply_factories(state)
    written = [tensor for tensor in nested_values(state) if isinstance(tensor, ShardedTensor)]
    return {
        "pinned": sum(weight.nbytes + weight.grad.nbytes for weight in weights),
        "moments": sum(moment.nbytes for moment in moments),
        "written": sum(
            tensor.data.numel() * (4 if tensor.key.startswith("optimizer") else 2)
            for tensor in written
            if is_main_replica(tensor.replica_id)
        ),
    }
