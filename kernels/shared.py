"""What goes between layers and operators: the same values for the reference and for the Triton version."""

from typing import NamedTuple

from torch import Tensor


class SharedKV(NamedTuple):
    """What a full layer hands to the sparse layers of its hybrid block.

    Plain tensors, so that recomputation and anything else that moves values between layers sees all of it. None is what
    the operators at hand do not need.
    """

    k: Tensor  # [B, S, K, D] after RoPE
    v: Tensor  # [B, S, K, D]
    # FP32 [B, S, K, D] without storage: sparse layers send their gradients of k and v through these two, so that they
    # add up in FP32 until the full layer's backward pass rounds them once.
    k_gradient: Tensor | None = None
    v_gradient: Tensor | None = None
    blocks: Tensor | None = None  # [B, K, S, tokens / block] int32, -1 where unused; None where no layer selects
    # `kernels.selection.Index` of the blocks
    entries: Tensor | None = None
    bounds: Tensor | None = None
    first_piece: Tensor | None = None
    pieces: Tensor | None = None

    @property
    def selection(self) -> tuple[Tensor | None, ...]:
        """The blocks and their index: what a recomputed full layer takes over instead of selecting again."""
        return self[4:]


class Branch(NamedTuple):
    """One branch of a sparse layer: whose keys and values it reads, its sink and its gate."""

    k: Tensor | None  # [B, S, K, D]
    v: Tensor | None  # [B, S, K, D]
    k_gradient: Tensor | None = None  # of SharedKV, if k and v are shared
    v_gradient: Tensor | None = None
    sink: Tensor | None = None  # [H], a logit that joins the softmax denominator and has no value
    gate: Tensor | None = None  # [B, S, H, 1 or D], in 0 to 1, multiplies the branch's output
