"""A share of the optimizer in host memory: Megatron's hybrid optimizer, with what 0.16.1 lacks for our checkpoints.

It is one optimizer for the GPU's share and one for each parameter in host memory, so that gradients, updates and new
weights travel while others are computed. Both hold FP32 master weights beside Adam's moments, and take gradients as
Megatron has reduced and clipped them, in FP32.
"""

import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from parallel.adam import Adam

MOMENTS = ("exp_avg", "exp_avg_sq")


class HybridAdam(HybridDeviceOptimizer):
    """Adam on both sides; states are there before the first step.

    Repaired, all but the last two seen to fail: a checkpoint had classes in it, which are refused when it is read; the
    step count stood still after a load; weights in FP32 could not be loaded; without a GPU the first step failed;
    master weights in host memory were not pinned; and the whole model was copied, in memory that was not freed, before
    a rank's share of it was.
    """

    def __init__(self, params, **settings):
        super().__init__(params, **settings | {"cpu_optimizer_cls": Adam, "gpu_optimizer_cls": Adam})
        for group in self.param_groups:
            del group["cpu_optimizer_cls"], group["gpu_optimizer_cls"]
            group["step"] = 0

    def step(self, closure=None) -> None:
        super().step(closure)  # hands its groups' settings to both sides, the step count among them
        for group in self.param_groups:
            group["step"] += 1

    def load_state_dict(self, state_dict: dict) -> None:
        """Megatron writes into the states by itself; of the groups only the step count is not set anew every step."""
        for group, loaded in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group["step"] = loaded["step"]

    def _init_sub_optimizers(self) -> None:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if any(isinstance(parameter, torch.nn.Parameter) for parameter in parameters):
            # Megatron makes one for the whole model first, of which it uses the settings, then that of a rank's share.
            self.cpu_optimizers, self.gpu_optimizer = [], None
            return
        super()._init_sub_optimizers()
        for optimizer in self.sub_optimizers:
            optimizer.create_states()
        self._sync_sub_optimizers_state_to_hdo()

    def _get_sub_optimizer_param_groups(self, offload_fraction: float) -> tuple[list, list, dict, dict, dict]:
        """Groups in host memory and groups that stay; master weight in host memory of a parameter, the reverse, and
        master weight of any parameter. The first parameters go to the host, until they make up the share."""
        of_host, of_device, host_of, parameter_of, master_of = [], [], {}, {}, {}
        left = offload_fraction * sum(parameter.numel() for group in self.param_groups for parameter in group["params"])
        for group in self.param_groups:
            host, device = [], []
            for parameter in group["params"]:
                moves = left > 0
                place = torch.device("cpu") if moves else parameter.device
                master = parameter.detach().to(place, torch.float32, copy=True)
                if moves:
                    left -= parameter.numel()
                    master = master.pin_memory() if parameter.is_cuda else master
                    host_of[parameter], parameter_of[master] = master, parameter
                master_of[parameter] = master
                (host if moves else device).append(master)
            of_host += [group | {"params": host}] if host else []
            of_device += [group | {"params": device}] if device else []
        return of_host, of_device, host_of, parameter_of, master_of

    @torch.no_grad()
    def _sync_hdo_state_to_sub_optimizers(self) -> None:
        """Take over what was loaded into `self.state`."""
        for optimizer in self.sub_optimizers:
            for master in list(optimizer.state):
                loaded = self.state[self.inner_param_to_orig_param[master]]
                master.copy_(loaded["master_param"])
                optimizer.state[master] = {name: loaded[name].to(master.device) for name in MOMENTS}
        self._sync_sub_optimizers_state_to_hdo()


def with_offload(config: OptimizerConfig, share: float, pinned: bool) -> OptimizerConfig:
    """`config` with that share of master weights and moments in host memory."""
    config.optimizer_cpu_offload, config.optimizer_offload_fraction = True, share
    config.overlap_cpu_optimizer_d2h_h2d, config.pin_cpu_grads = True, pinned
    # What use_precision_aware_optimizer stands for: the optimizer holds the master weights, so that they move with it.
    # Asking for it by that name fails without Transformer Engine, of which nothing is needed.
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    return config
