"""Megatron-core on machines without a GPU: the same code path on CPU processes that talk through gloo.

`install()` must run before anything of Megatron is built, and is not called where a GPU computes. It answers the calls
that Megatron makes to `torch.cuda` and rewrites device="cuda"; nothing about the computation changes.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _CudaMeans(TorchFunctionMode):
    """Rewrites cuda to another device; lets FP32 tensors pass for CUDA ones where Megatron compares type names."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return function(*args).replace("torch.", "torch.cuda.", 1)
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": self.device}
        if function is torch.Tensor.to:
            args = tuple(self.device if _is_cuda(argument) else argument for argument in args)
        return function(*args, **kwargs)


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _NoStream:
    """Stands for a CUDA stream or event: on a CPU everything is already in order."""

    def __init__(self, *arguments, **keywords):
        pass

    def __getattr__(self, name):
        return lambda *arguments, **keywords: self  # record_event() returns an event


def _does_nothing():
    """A new function each time: torch.compile refuses one function under two names of torch.cuda."""
    return lambda *arguments, **keywords: None


def install(device: torch.device = CPU) -> None:
    """Make Megatron-core 0.16.1 run on the CPU in this process, or on meta tensors. A second call does nothing."""
    if getattr(torch.cuda, "_stands_for_cpu", False):
        return
    _repair_megatron()  # imports it first: what it wraps at import must be the real torch.cuda
    replacements = {
        "current_device": lambda: device,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "Stream": _NoStream,
        "Event": _NoStream,
        "current_stream": lambda device=None: _NoStream(),
        "default_stream": lambda device=None: _NoStream(),
        "stream": lambda stream: contextlib.nullcontext(),
    }
    for name in ("set_device", "synchronize", "empty_cache"):
        replacements[name] = _does_nothing()
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _does_nothing())
    torch.compiler.set_stance("force_eager")  # Megatron compiles small functions; that would need a C++ compiler here
    torch.cuda._stands_for_cpu = True
    _CudaMeans(device).__enter__()


def _repair_megatron() -> None:
    import megatron.core.models.gpt  # noqa: F401 (all that wraps functions at import)
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    random._get_cuda_rng_state = lambda device=None, clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)

    moved = moe_utils.maybe_move_tensor_to_cpu

    def as_splits(tensor, as_numpy=False, record_stream=False):
        # The original leaves CPU tensors alone; the dispatcher then needs the NumPy array that it asked for.
        if torch.is_tensor(tensor) and as_numpy:
            return tensor.numpy()
        return moved(tensor, as_numpy, record_stream)

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = as_splits
