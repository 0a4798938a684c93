"""Our Adam against torch's, and the one thing it does otherwise: where the step count lives."""

import torch
from torch.testing import assert_close

from parallel.adam import Adam

SETTINGS = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-10}


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (5,))]


def take_steps(optimizer: torch.optim.Optimizer, ours: list[torch.nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step + 1)
        for parameter in ours:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_updates_equal_torch_adamw():
    ours, theirs = parameters(), parameters()
    take_steps(Adam(ours, adam_w_mode=True, **SETTINGS), ours, 0, 5)
    take_steps(torch.optim.AdamW(theirs, **SETTINGS), theirs, 0, 5)
    assert_close(ours, theirs, rtol=0, atol=0)


def test_a_reloaded_state_without_step_tensors_goes_on_where_it_was():
    whole, parts = parameters(), parameters()
    take_steps(Adam(whole, adam_w_mode=True, **SETTINGS), whole, 0, 5)
    first = Adam(parts, adam_w_mode=True, **SETTINGS)
    take_steps(first, parts, 0, 3)
    state = first.state_dict()
    assert all(set(tensors) == {"exp_avg", "exp_avg_sq"} for tensors in state["state"].values())
    second = Adam(parts, adam_w_mode=True, **SETTINGS)
    second.load_state_dict(state)
    take_steps(second, parts, 3, 5)
    assert_close(parts, whole, rtol=0, atol=0)
