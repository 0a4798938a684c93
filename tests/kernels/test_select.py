"""Which version of the operators a run gets, and what it is told."""

import logging
import re
from types import SimpleNamespace

import pytest
import torch

import kernels
from kernels import Needs, capability, operators, reference

FITS = Needs(head_dim=128, group=16, block=64, dtype=torch.bfloat16)


def on_a_gpu(monkeypatch, capability_=(9, 0), shared_memory=227):
    """As if this machine had a CUDA device, without the interpreter."""
    monkeypatch.setattr("kernels.arguments.INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability_)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    properties = SimpleNamespace(shared_memory_per_block_optin=1024 * shared_memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)


@pytest.mark.parametrize("choice", ["auto", "triton"])
def test_a_gpu_gets_the_triton_operators(choice, monkeypatch):
    on_a_gpu(monkeypatch)
    assert kernels.select(choice, FITS) is operators


def test_the_reference_can_be_asked_for_by_name(monkeypatch, caplog):
    on_a_gpu(monkeypatch)
    with caplog.at_level(logging.INFO, logger="kernels"):
        assert kernels.select("reference", FITS) is reference
    assert not caplog.text  # not a fallback


@pytest.mark.parametrize("choice", ["Triton", "", None])
def test_a_choice_that_does_not_exist_is_refused(choice):
    with pytest.raises(kernels.KernelError, match=f"kernels={choice} does not exist; use auto, triton or reference"):
        kernels.select(choice, FITS)


@pytest.mark.parametrize(
    "needs, message",
    [
        (Needs(128, 16, 64, torch.float32), "bfloat16 or float16, not float32"),
        (Needs(128, 6, 64, torch.bfloat16), "heads / kv_heads = 6 must be a power of two"),
        (Needs(128, 16, 48, torch.bfloat16), "attention.block=48 must be one of 16, 32, 64, 128"),
        (Needs(100, 16, 64, torch.bfloat16), "model.head_dim=100 must be a multiple of 8"),
        (Needs(192, 16, 128, torch.bfloat16), "attention.block=128 must be 64 or less with model.head_dim=192"),
    ],
)
def test_what_the_kernels_do_not_take_is_named(needs, message, monkeypatch, caplog):
    on_a_gpu(monkeypatch)
    monkeypatch.setattr("kernels.arguments.DTYPES", (torch.bfloat16, torch.float16))
    with pytest.raises(kernels.KernelError, match=message):
        kernels.select("triton", needs)
    with caplog.at_level(logging.INFO, logger="kernels"):
        assert kernels.select("auto", needs) is reference
    assert message in caplog.text


def test_an_old_gpu_is_named(monkeypatch):
    on_a_gpu(monkeypatch, (8, 0))
    with pytest.raises(kernels.KernelError, match="some GPU has compute capability 8.0; the kernels need 9.0"):
        kernels.select("triton", FITS)


def test_a_gpu_with_too_little_shared_memory_is_named(monkeypatch):
    on_a_gpu(monkeypatch, (12, 0), shared_memory=99)
    with pytest.raises(kernels.KernelError, match="some GPU gives a program 99 KiB of shared memory; .* 227 KiB"):
        kernels.select("triton", FITS)


def test_without_a_gpu_triton_is_refused_and_auto_says_why(monkeypatch, caplog):
    monkeypatch.setattr("kernels.arguments.INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(kernels.KernelError, match="kernels=triton cannot run: there is no CUDA device"):
        kernels.select("triton", FITS)
    with caplog.at_level(logging.INFO, logger="kernels"):
        assert kernels.select("auto", FITS) is reference
    assert "there is no CUDA device" in caplog.text


def test_the_interpreter_runs_only_by_name(monkeypatch):
    monkeypatch.setattr("kernels.arguments.INTERPRETED", True)
    assert kernels.select("triton", FITS) is operators
    assert kernels.select("auto", FITS) is reference


def test_the_table_says_what_runs_here(capsys, monkeypatch):
    from kernels import __main__

    on_a_gpu(monkeypatch)
    __main__.main()
    assert "Triton operators: run here" in (text := capsys.readouterr().out) and "Gluon  " in text
    monkeypatch.setattr("kernels.arguments.INTERPRETED", True)
    __main__.main()
    assert "run in Triton's CPU interpreter" in (text := capsys.readouterr().out) and "Gluon  " not in text
    monkeypatch.setattr(__main__, "machine_lacks", lambda: "no such device")
    __main__.main()
    assert "do not run here, no such device" in (text := capsys.readouterr().out)
    assert re.search("decode, full and sparse layer +reference +has none", text)
    assert capability.machine_lacks() is None


def test_the_table_tells_the_kernels_made_for_hopper_from_those_for_all(capsys, monkeypatch):
    from kernels import __main__

    for capability_, experts in (((9, 0), "Gluon +Gluon"), ((10, 0), "torch grouped_mm +torch grouped_mm")):
        on_a_gpu(monkeypatch, capability_)
        __main__.main()
        assert re.search(f"experts' matrix products +{experts}", capsys.readouterr().out)
