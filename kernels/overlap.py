"""Kernels that start before what the one ahead has written can be read: programmatic dependent launch, from Hopper on.

A kernel launched with `**overlapping()` may get onto multiprocessors as soon as all programs of the previous one of its
stream have finished, before what they wrote has arrived in memory: what starting costs is then hidden. In return it
must call `wait_for_previous` before it reads or writes memory that any other kernel uses; the call returns when all
that the previous kernel wrote can be read. Every program has to call it, whether it has work or not: the next kernel
waits for this one only, and takes all before it for finished. Kernels launched as usual, PyTorch's among them, wait as
ever. To let a kernel start even before the programs of the previous one have finished made a layer slower, not faster.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

from kernels.arguments import INTERPRETED


def overlapping() -> dict:
    """Options of a launch, among them OVERLAP, which the kernel hands to `wait_for_previous`."""
    return {"OVERLAP": False} if INTERPRETED else {"OVERLAP": True, "launch_pdl": True}


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Stands before the first access to global memory; where a kernel has several kinds of warps, in each kind."""
    if OVERLAP:
        cuda.gdc_wait()
