"""Training steps on DeepSpeed's ZeRO: data parallelism only, with whatever a rank can do without held elsewhere.

The model is the one that Megatron trains, built for one rank, and so are the groups of parameters, the weights of the
loss and the checkpoints: a run can change its engine, its stage and its number of ranks at any checkpoint.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from types import ModuleType

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias, reset_model_temporary_tensors
from megatron.core.optimizer import OptimizerConfig, _get_param_groups
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from parallel.engines import AdamW, Engine, MicroBatch, Step, Zero, state_dicts
from parallel.start import StartError

MOMENTS = ("exp_avg", "exp_avg_sq")
PARTS = ("param", *MOMENTS)  # of the optimizer's state, all FP32; Megatron's names in checkpoints


class DeepSpeedEngine(Engine):
    """One model chunk on every rank."""

    def __init__(
        self,
        config: TransformerConfig,
        build: Callable[[TransformerConfig, bool, bool, int | None], MegatronModule],
        forward: Callable[..., Tensor],
        adamw: AdamW,
        device: torch.device,
        zero: Zero,
    ):
        deepspeed = _import_deepspeed(device, zero)
        self.config, self.forward, self.device, self.adamw = config, forward, device, adamw
        module = build(config, True, True, None).to(device)
        self.modules = [module]
        self.ranks = parallel_state.get_data_parallel_world_size()
        # Taken down before ZeRO-3 leaves empty tensors
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self.described = module.sharded_state_dict(metadata={"dp_cp_group": group})
        self.shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        self.owners = _owners({name: shape.numel() for name, shape in self.shapes.items()}, self.ranks)
        # A layer's parameters come and go together: it uses some without calling the module that holds them, which is
        # what DeepSpeed would wait for.
        deepspeed.utils.set_z3_leaf_modules(module, [TransformerLayer])
        groups = _get_param_groups([module], OptimizerConfig(lr=0.0), None)
        self.has_experts = any(group["is_expert_parallel"] for group in groups)
        for parameter in module.parameters():
            parameter.allreduce = True  # Megatron's mark of experts is DeepSpeed's of experts that are split over ranks
        # Torch's own, also where states are on the CPU: DeepSpeed's would be compiled at the start of the run.
        self.adam = torch.optim.AdamW(groups, lr=0.0, fused=True)
        with redirect_stdout(StringIO()):  # it prints tables of memory; its warnings come all the same
            self.engine, *_ = deepspeed.initialize(
                model=module, optimizer=self.adam, config=_settings(zero, adamw, config.bf16), dist_init_required=False
            )
        self._create_moments()
        self.tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.steps = 0  # taken, of the whole run

    def step(self, micro_batches: Sequence[MicroBatch], learning_rate: float, **settings) -> Step:
        self._set_hyperparameters(learning_rate)
        count = sum(batch["loss_mask"].sum(dtype=torch.float64) for batch in micro_batches).to(self.device)
        torch.distributed.all_reduce(count)
        # DeepSpeed averages gradients over ranks; what is wanted is their sum over the tokens of all ranks.
        scale = (self.ranks / count.clamp(min=1)).float()
        MoEAuxLossAutoScaler.set_loss_scale(scale.reshape(1))  # Megatron's shape
        self.engine.train()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, batch in enumerate(micro_batches):
            self.engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            self.enter("forward-backward")
            loss, mask = self._losses(batch, settings)
            loss = (loss * mask).sum()
            self.engine.backward(loss * scale, scale_wrt_gas=False)
            total += loss.detach()
        self.enter("optimizer")
        torch.distributed.all_reduce(total)
        if self.config.moe_router_enable_expert_bias:
            _update_router_expert_bias(self.modules, self.config)
        reset_model_temporary_tensors(self.config, self.modules)
        self.engine.step()
        self.steps += 1
        return Step(float(total / count.clamp(min=1)), int(count), float(self.engine.get_global_grad_norm()))

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch], buckets: int, **settings) -> Tensor:
        self.engine.eval()
        totals = torch.zeros(buckets, 2, dtype=torch.float64, device=self.device)
        for batch in micro_batches:
            self.enter("evaluation")
            loss, mask = self._losses(batch, settings)
            both = torch.stack([loss * mask, mask], dim=-1).sum(0)  # [S, 2]
            totals += both.double().unflatten(0, (buckets, -1)).sum(1)
        torch.distributed.all_reduce(totals)
        return totals

    def _losses(self, batch: MicroBatch, settings: dict) -> tuple[Tensor, Tensor]:
        """Each token's loss and weight [B, S] FP32."""
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        mask = batch.pop("loss_mask")
        return self.forward(self.engine, batch, **settings).float(), mask

    def _set_hyperparameters(self, learning_rate: float) -> None:
        for group in self.adam.param_groups:
            group["lr"], group["eps"] = learning_rate, self.adamw.epsilon
            group["betas"] = (self.adamw.beta1, self.adamw.beta2)
            group["weight_decay"] = self.adamw.weight_decay * group["wd_mult"]

    def _create_moments(self) -> None:
        """Adam makes its states in the first step; a checkpoint that is loaded needs them before."""
        zero = self.engine.optimizer
        for index, flat in enumerate(self._flat_partitions()):
            swapped = self._is_swapped(index)
            if swapped:
                zero._optimizer_states_and_gradient_swap_in(index)
            self.adam.state[flat] = {
                "step": torch.zeros((), device=flat.device),
                **{name: torch.zeros_like(flat) for name in MOMENTS},
            }
            if swapped:
                zero._optimizer_states_and_gradient_swap_out(index)
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            zero._lazy_init_hp_params_optimizer_state()

    def _flat_partitions(self) -> list[Tensor]:
        """What Adam sees on this rank: flat FP32 pieces of many parameters."""
        if hasattr(self.engine.optimizer, "fp32_partitioned_groups_flat"):
            return self.engine.optimizer.fp32_partitioned_groups_flat
        return [flat for group in self.adam.param_groups for flat in group["params"]]

    def _is_swapped(self, index: int) -> bool:
        zero = self.engine.optimizer
        return hasattr(zero, "_swappable_optimizer_subgroup") and zero._swappable_optimizer_subgroup(index)

    def state(self, is_loading: bool = False) -> dict:
        """What the Megatron engine writes, each parameter from one rank only; for loading without the BF16 weights."""
        model, held = {}, {}
        for name, entry in self.described.items():
            tensor = self.tensors.get(name)
            if name not in self.owners:  # a buffer, or the extra state of a layer that has none
                model[name] = entry if tensor is None else replace(entry, data=tensor)
                continue
            wholes = {} if is_loading else {part: _get(tensor, part) for part in PARTS}
            if self.owners[name] != torch.distributed.get_rank():
                continue
            if is_loading:
                wholes = {part: torch.empty(self.shapes[name]) for part in PARTS}
            else:
                model[name] = _entry(entry, entry.key, wholes["param"].to("cpu", self.config.params_dtype))
            held[name] = {
                part: _entry(entry, f"optimizer.state.{part}.{entry.key}", whole.cpu())
                for part, whole in wholes.items()
            }
        return {"model0": model, "optimizer": self._as_megatron(held)}

    def load_state(self, state: dict) -> None:
        (first, *_) = state_dicts(state["optimizer"])
        self.steps = first["optimizer"]["param_groups"][0]["step"]
        for moments in self.adam.state.values():
            moments["step"].fill_(self.steps)
        for name, owner in self.owners.items():
            for part in PARTS:
                if owner == torch.distributed.get_rank():
                    whole = first["param_state"][name][part].to(self.device)
                else:
                    whole = torch.empty(self.shapes[name], device=self.device)
                torch.distributed.broadcast(whole, src=owner)
                _set(self.tensors[name], part, whole)
        for name, tensor in self.tensors.items():
            if name not in self.owners and name in state["model0"]:
                tensor.copy_(state["model0"][name])

    def _as_megatron(self, held: dict) -> dict:
        """Megatron has one optimizer, and with experts a second one; it takes over nothing but their step."""
        first, second = ({"optimizer": {"param_groups": [{"step": self.steps}]}, "param_state": {}} for _ in range(2))
        first["param_state"] = held
        return {0: first, 1: second} if self.has_experts else first


def _get(parameter: torch.nn.Parameter, part: str) -> Tensor:
    """The whole FP32 parameter or moment, on all ranks, which must all call this."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    return safe_get_full_fp32_param(parameter) if part == "param" else safe_get_full_optimizer_state(parameter, part)


@torch.no_grad()
def _set(parameter: torch.nn.Parameter, part: str, whole: Tensor) -> None:
    """Each rank keeps its piece of `whole`; of the parameter also what the model computes with."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if part != "param":
        safe_set_full_optimizer_state(parameter, whole, part)
        return
    safe_set_full_fp32_param(parameter, whole)
    with GatheredParameters(parameter, modifier_rank=0):
        parameter.data.copy_(whole)


def _entry(
    entry: ShardedTensor | ShardedTensorFactory, key: str, whole: Tensor
) -> ShardedTensor | ShardedTensorFactory:
    """The description of a parameter, with another tensor of its shape, that only this rank writes."""
    dtype = {"dtype": whole.dtype} if isinstance(entry, ShardedTensor) else {}
    return replace(entry, key=key, data=whole, replica_id=(0, 0, 0), **dtype)


def _owners(sizes: dict[str, int], ranks: int) -> dict[str, int]:
    """The rank that writes and reads each parameter, so that all have about as much to do."""
    owners, held = {}, [0] * ranks
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        owners[name] = held.index(min(held))
        held[owners[name]] += size
    return owners


def _settings(zero: Zero, adamw: AdamW, bf16: bool) -> dict:
    """The configuration that DeepSpeed reads."""

    def place(device: str) -> dict:
        return {"device": str(device), "nvme_path": zero.nvme, "pin_memory": torch.cuda.is_available()}

    sharding = {
        "stage": zero.zero,
        "stage3_param_persistence_threshold": 0,  # small parameters come with their layer
        "offload_optimizer": place(zero.offload_optimizer),
        "offload_param": place(zero.offload_parameters),
    }
    if zero.offload_optimizer == "nvme":
        sharding["sub_group_size"] = 10**8  # elements, swapped in together, for every parameter of a checkpoint, too
    return {
        "train_micro_batch_size_per_gpu": 1,  # a number that must be there; batches come as they are
        "gradient_accumulation_steps": 1,  # and `step` says where they end
        "gradient_clipping": adamw.clip,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": sharding,
    }


def _import_deepspeed(device: torch.device, zero: Zero) -> ModuleType:
    """DeepSpeed for this device, without compiling anything that can be done without."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # the device it takes, whatever launcher there was
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}  # else it tries which of its operators compile, and on a CPU compiles one
    if "nvme" in (zero.offload_optimizer, zero.offload_parameters):
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise StartError(
                "offloading to NVMe needs DeepSpeed's async_io, which cannot be compiled here; install libaio-dev, "
                "ninja and a C++ compiler, or offload to cpu"
            )
    return deepspeed
