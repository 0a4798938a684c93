"""Who computes the matrix products: what Transformer Engine needs, and its experts in our layer."""

import importlib.metadata

import pytest
import torch
from torch.testing import assert_close

from hysparse.choices import ExpertProducts, Precision
from hysparse.config import ConfigError
from hysparse.linears import MEGATRON, select_linears
from tests.models import small_config

HIDDEN = 48  # of the small model


def asking_for(**choices):
    config = small_config()
    for name, value in choices.items():
        setattr(config, name, value)
    return config


def test_bf16_takes_the_layers_of_megatron_and_our_experts():
    assert select_linears(asking_for(precision=Precision.bf16)) == MEGATRON


@pytest.mark.parametrize(
    "choices, asked",
    [
        ({"precision": Precision.fp8}, "^precision=fp8 cannot run"),
        ({"experts": ExpertProducts.te}, "^experts=te cannot run"),
        ({"precision": Precision.fp8, "experts": ExpertProducts.te}, "^precision=fp8 and experts=te cannot run"),
    ],
)
def test_what_the_machine_lacks_is_named(monkeypatch, choices, asked):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ConfigError, match=f"{asked}.*pip install transformer-engine.*precision=bf16 experts=auto"):
        select_linears(asking_for(**choices))


def test_fp8_needs_a_gpu_that_has_it(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.20.2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="there is no CUDA device"):
        select_linears(asking_for(precision=Precision.fp8))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ConfigError, match="NVIDIA A100 has compute capability 8.0; FP8 needs 8.9"):
        select_linears(asking_for(precision=Precision.fp8))
    assert select_linears(asking_for(experts=ExpertProducts.te)).experts_by_engine  # in BF16 it may be older


class GroupedLinear(torch.nn.Module):
    """Takes and returns what Transformer Engine's does, one expert after the other."""

    def __init__(self, num_gemms, input_size, output_size, **settings):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(num_gemms, output_size, input_size))

    def forward(self, rows, counts: list[int]):
        parts = zip(rows.split(counts), self.weight, strict=True)
        return torch.cat([torch.nn.functional.linear(part, weight) for part, weight in parts]), None


def test_experts_of_megatron_in_our_layer_equal_ours(megatron):
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import TEGroupedMLP
    from megatron.core.transformer.spec_utils import ModuleSpec, build_module

    from hysparse.ffn import ffn_spec
    from hysparse.model import transformer_config
    from kernels import reference

    config = small_config()
    spec = ffn_spec(config.model, 0, reference.moe)
    ours = build_module(spec, config=transformer_config(config, [], bf16=False))
    spec.submodules.experts = ModuleSpec(
        TEGroupedMLP, submodules=MLPSubmodules(linear_fc1=GroupedLinear, linear_fc2=GroupedLinear)
    )
    theirs = build_module(spec, config=transformer_config(config, [], bf16=False))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        ours.router.weight.normal_(std=0.3, generator=generator)
        for parameter in ours.experts.parameters():
            parameter.normal_(std=0.3, generator=generator)
        theirs.router.weight.copy_(ours.router.weight)
        theirs.experts.linear_fc1.weight.copy_(ours.experts.fc1)
        theirs.experts.linear_fc2.weight.copy_(ours.experts.fc2)
    x = torch.randn(9, 2, HIDDEN, generator=generator)
    assert_close(theirs.eval()(x)[0], ours.eval()(x)[0], rtol=1e-5, atol=1e-6)  # FP32 sums in another order
