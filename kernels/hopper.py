"""What the Gluon kernels of attention for Hopper have in common: tiles that the copy engine moves, and barriers."""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


def head_tiles(x: Tensor, tokens: int, heads: int) -> TensorDescriptor:
    """Moves tiles [1, tokens, heads, D] of x [B, T, all heads, D]; outside of x reads as zero and is not written."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * x.element_size(), rank=4)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, tokens, heads, x.shape[3]], layout)


@gluon.jit
def barriers(N: gl.constexpr, ARRIVALS: gl.constexpr):
    """N barriers in shared memory, each of which completes a phase after so many arrivals."""
    new = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(new.index(i), count=ARRIVALS)
    return new
