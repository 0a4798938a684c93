"""AdamW that keeps its step in the parameter group: for Megatron without Transformer Engine or Apex.

torch's AdamW keeps one step tensor for each parameter, which Megatron's reshardable checkpoints do not carry: after a
load the bias correction would start over. The fused optimizers that Megatron prefers keep it in the group; so does this
one, around torch's own update.
"""

import torch
from torch.optim.adamw import adamw


class Adam(torch.optim.Optimizer):
    """Decoupled weight decay, FP32 states; the update of `torch.optim.AdamW`."""

    def __init__(self, params, lr, weight_decay, betas, eps, adam_w_mode: bool):
        if not adam_w_mode:
            raise ValueError("only decoupled weight decay (AdamW) is supported")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "step": 0})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            states = [self._state(parameter) for parameter in parameters]
            before = torch.tensor(float(group["step"] - 1))
            adamw(
                parameters,
                [parameter.grad for parameter in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [before.clone() for _ in parameters],  # the update adds one to each
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _state(self, parameter: torch.Tensor) -> dict:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state
