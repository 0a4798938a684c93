"""Every kernel once, on a short ragged sequence: what compute-sanitizer is run on.

compute-sanitizer --tool memcheck python -m tests.gpu.small_run
"""

from unittest import mock

import torch
from torch import Tensor

from kernels import causal_hopper, moe, operators, sparse_hopper
from kernels.causal_backward import causal_backward
from kernels.decode import decode_full, decode_sparse
from kernels.scored import scored_forward
from kernels.shared import PAGE, KVCache
from tests.gpu.test_moe import grouped
from tests.kernels.cases import Layers, starts

BLOCK, SELECTED, WINDOW = 64, 3, 128
DOCUMENTS = [200, 1, 36]
TOKENS = sum(DOCUMENTS)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def send_back(*outputs: Tensor) -> None:
    torch.autograd.backward(outputs, [torch.randn_like(output) for output in outputs])


def hybrid_block(H: int, K: int) -> None:
    """Forward and backward."""
    for variant in ("hysparse", "hybrid_swa"):
        layers = Layers.random(starts([DOCUMENTS], "cuda"), H, K, 128, dtype=torch.bfloat16)
        layers.gradients(layers.run(operators, variant, BLOCK, SELECTED, WINDOW))


@torch.no_grad()
def full_layer(H: int, K: int) -> None:
    """With sinks, which the forward version for Hopper does not take."""
    q, k, v, sink = random(1, TOKENS, H, 128), random(1, TOKENS, K, 128), random(1, TOKENS, K, 128), random(H)
    start = starts([DOCUMENTS], "cuda")
    output, lse, *_ = scored_forward(q, k, v, start, block=BLOCK, selected=SELECTED, sink=sink)
    causal_backward(q, k, v, output, lse, output, start, sink=sink)


def decode(H: int, K: int) -> None:
    """Two sequences, of which one is short, in buffers and in pages."""
    lengths = torch.tensor([300, 5], device="cuda", dtype=torch.int32)
    q, gate = random(2, H, 128), random(2, H)
    cache, ring = (KVCache(*random(2, 2, tokens, K, 128)) for tokens in (300, WINDOW))
    table = torch.randperm(10, device="cuda").int().view(2, 5)
    for keys in (cache, KVCache(*random(2, 10, PAGE, K, 128), table)):
        _, blocks = decode_full(q, keys, lengths, block=BLOCK, selected=SELECTED)
        decode_sparse(q, keys, blocks, ring, lengths, block=BLOCK, window=WINDOW, sparse_gate=gate, window_gate=gate)


def rotary(H: int, K: int) -> None:
    """A sparse layer's projection of packed documents: query, key, value and two gates."""
    position = torch.arange(TOKENS, device="cuda") - starts([DOCUMENTS], "cuda")[0]
    angle = position.view(-1, 1, 1, 1) * torch.rand(128, device="cuda")
    y = random(TOKENS, 1, K, (H // K + 2) * 128 + 2 * (H // K)).requires_grad_()
    query, key, value, gates = operators.rotary_split(y, angle.cos(), angle.sin(), H // K, own_kv=True, gates=2)
    send_back(query, key, value, *gates)


def experts(score: str) -> None:
    """Routing and experts, one of them idle, of widths that the grouped products for Hopper take."""
    E, active, hidden, ffn = 8, 2, 256, 256
    logits = random(TOKENS, 1, E, dtype=torch.float32).requires_grad_()
    idle = torch.tensor([0.0] * (E - 1) + [-100], device="cuda")
    x, fc1, fc2 = (random(*s).requires_grad_() for s in ((TOKENS, hidden), (E, 2 * ffn, hidden), (E, hidden, ffn)))
    routing = moe.route(logits, idle, active, score, balance=True)
    moe.tally(routing, torch.zeros(E, device="cuda", dtype=torch.int64))
    send_back(grouped(x, fc1, fc2, routing, routing.weights), routing.score_sums)


if __name__ == "__main__":
    for H, K in ((64, 4), (8, 2)):
        for part in (hybrid_block, full_layer, decode, rotary):
            part(H, K)
        for module in (causal_hopper, sparse_hopper):  # what runs where the versions for Hopper do not
            with mock.patch.object(module, "supported", lambda *_: False):
                hybrid_block(H, K)
    for score in ("sigmoid", "softmax"):
        experts(score)
    torch.cuda.synchronize()
    print("done")
