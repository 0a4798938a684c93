"""What goes between layers and operators: the same values for the reference and for the Triton version."""

from typing import NamedTuple

from torch import Tensor

from kernels.errors import KernelError

PAGE = 64  # tokens in a page of a paged cache


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


class KVCache(NamedTuple):
    """Keys (after RoPE) and values of one layer, for decoding: one buffer per sequence, or 64-token pages.

    k [B, T_max, K, D], v [B, T_max, K, Dv]; paged: k [pages, 64, K, D], v [pages, 64, K, Dv], and token t of sequence b
    lies in page `page_table[b, t // 64]`.
    """

    k: Tensor
    v: Tensor
    page_table: Tensor | None = None  # [B, pages of a sequence] int32


class Branch(NamedTuple):
    """One branch of a sparse layer: whose keys and values it reads, its sink and its gate."""

    k: Tensor | None  # [B, S, K, D]
    v: Tensor | None  # [B, S, K, D]
    k_gradient: Tensor | None = None  # of SharedKV, if k and v are shared
    v_gradient: Tensor | None = None
    sink: Tensor | None = None  # [H], a logit that joins the softmax denominator and has no value
    gate: Tensor | None = None  # [B, S, H, 1 or D], in 0 to 1, multiplies the branch's output


def check_layer(sparse: Branch | None, window: Branch | None, shared: SharedKV) -> None:
    """A sparse layer has a branch, and blocks where it needs them. Raises KernelError."""
    if sparse is None and window is None:
        raise KernelError("sparse and window are both None; a sparse layer needs at least one of them")
    if sparse is not None and shared.blocks is None:
        raise KernelError("shared.blocks is None; a sparse branch needs the SharedKV of oracle_attention")
