"""AdamW that keeps its step in the parameter group: for Megatron without Transformer Engine or Apex.

torch's AdamW keeps one step tensor for each parameter, which Megatron's reshardable checkpoints do not carry: after a
load the bias correction would start over. The fused optimizers that Megatron prefers keep it in the group; so does this
one, around torch's own update.
"""

import torch
from torch.optim.adamw import adamw


class Adam(torch.optim.Optimizer):
    """Decoupled weight decay, FP32 states; the update of `torch.optim.AdamW`.

    With `fused` what lies in host memory is updated in one pass over it.
    """

    def __init__(
        self, params, lr=0.0, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, adam_w_mode: bool = True, fused=False
    ):
        if not adam_w_mode:
            raise ValueError("only decoupled weight decay (AdamW) is supported")
        settings = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "fused": fused, "step": 0}
        super().__init__(params, settings)

    def create_states(self) -> None:
        """Before the first step, for checkpoints that are read into them."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._state(parameter)

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
                fused=True if group["fused"] and parameters[0].device.type == "cpu" else None,
            )

    def _state(self, parameter: torch.Tensor) -> dict:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state
