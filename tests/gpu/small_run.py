"""Every kernel of a hybrid block once, on a short ragged sequence: what compute-sanitizer is run on.

compute-sanitizer --tool memcheck python -m tests.gpu.small_run
"""

from unittest import mock

import torch

from kernels import operators, sparse_hopper
from kernels.decode import KVCache, decode_full, decode_sparse
from tests.kernels.cases import Layers, starts

BLOCK, SELECTED, WINDOW = 64, 3, 128


def hybrid_block(H: int, K: int) -> None:
    """Forward and backward, with the kernels for Hopper and those for all other cases."""
    for supported in (sparse_hopper.supported, lambda *_: False):
        with mock.patch.object(sparse_hopper, "supported", supported):
            for variant in ("hysparse", "hybrid_swa"):
                layers = Layers.random(starts([[200, 1, 36]], "cuda"), H, K, 128, dtype=torch.bfloat16)
                layers.gradients(layers.run(operators, variant, BLOCK, SELECTED, WINDOW))


def decode(H: int, K: int) -> None:
    """Two sequences, of which one is short."""
    lengths = torch.tensor([300, 5], device="cuda", dtype=torch.int32)
    q, gate = (torch.randn(2, H, width, device="cuda", dtype=torch.bfloat16) for width in (128, 1))
    cache, ring = (
        KVCache(*torch.randn(2, 2, tokens, K, 128, device="cuda", dtype=torch.bfloat16)) for tokens in (300, WINDOW)
    )
    _, blocks = decode_full(q, cache, lengths, block=BLOCK, selected=SELECTED)
    gates = {"sparse_gate": gate.squeeze(-1), "window_gate": gate.squeeze(-1)}
    decode_sparse(q, cache, blocks, ring, lengths, block=BLOCK, window=WINDOW, **gates)


if __name__ == "__main__":
    for H, K in ((64, 4), (8, 2)):
        hybrid_block(H, K)
        decode(H, K)
    torch.cuda.synchronize()
    print("done")
