"""Kernels that start while the one before them still runs: programmatic dependent launch, from Hopper on.

A kernel launched with `**overlapping()` may get onto multiprocessors before the previous one of its stream is done:
once all programs of that one have finished or, with EARLY, once all of them have begun and there is room. What starting
costs is then hidden. In return it must call `wait_for_previous` before it reads or writes memory that any other kernel
uses; the call returns when the previous kernel has finished and all that it wrote can be read. Every program has to
call it, whether it has work or not: the next kernel waits for this one only, and takes all before it for finished.
Kernels launched as usual, PyTorch's among them, wait as ever.

PDL and EARLY are read at each launch.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from kernels.arguments import INTERPRETED
from kernels.capability import OLDEST

PDL = True  # whether kernels overlap at all
EARLY = True  # whether they make room for the next one as soon as all of their programs have begun

WAITS, LETS_START = tl.constexpr(1), tl.constexpr(2)


def overlapping() -> dict:
    """Options of a launch, among them OVERLAP, which the kernel hands to `wait_for_previous`."""
    if not (PDL and _possible()):
        return {"OVERLAP": 0}
    return {"OVERLAP": (LETS_START if EARLY else WAITS).value, "launch_pdl": True}


@cache
def _possible() -> bool:
    return not INTERPRETED and torch.cuda.get_device_capability() >= OLDEST


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Stands before the first access to global memory; where a kernel has several kinds of warps, in each kind."""
    if OVERLAP >= WAITS:
        cuda.gdc_wait()
    if OVERLAP >= LETS_START:
        cuda.gdc_launch_dependents()
