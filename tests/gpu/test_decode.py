"""Decoding on a GPU, BF16 against FP64, beside PyTorch's own attention: long, ragged, paged and poisoned caches."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.decode import decode_full, decode_sparse
from kernels.shared import PAGE, KVCache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

WINDOW = 128
# query heads, KV heads, D, Dv, key block, selected blocks, capacity, lengths
CASES = {
    "80B": (64, 4, 128, 128, 64, 16, 131_072, (131_072, 1, 70_001)),
    "7B": (32, 8, 128, 128, 64, 16, 131_072, (131_071, 128, 65)),
    "192 wide": (32, 2, 192, 128, 64, 16, 10_000, (10_000, 4097)),
    "tiny": (4, 2, 32, 32, 16, 5, 500, (500, 1, 333)),
    "128 blocks": (16, 8, 64, 64, 128, 8, 20_000, (20_000, 129)),
    "32 blocks, many": (64, 2, 128, 128, 32, 32, 300_000, (300_000,)),
}
LAYOUTS = [  # of the cache, one for each case, since each is compiled anew
    ("80B", "contiguous"),
    ("80B", "paged"),
    ("7B", "paged"),
    ("192 wide", "contiguous"),
    ("tiny", "contiguous"),
    ("128 blocks", "paged"),
    ("32 blocks, many", "contiguous"),
]


def example(name: str, paged: bool) -> tuple[Tensor, KVCache, Tensor, list[tuple[Tensor, Tensor]]]:
    """Queries, a cache that holds NaN where no token is, lengths, and each sequence's keys and values [T, K, D]."""
    H, K, D, Dv, *_, capacity, lengths = CASES[name]
    B, pages = len(lengths), -(-capacity // PAGE)
    k, v = (torch.randn(B, pages * PAGE, K, width, device="cuda").bfloat16() for width in (D, Dv))
    tokens = [(k[b, :length].clone(), v[b, :length].clone()) for b, length in enumerate(lengths)]
    for b, length in enumerate(lengths):
        k[b, length:], v[b, length:] = torch.nan, torch.nan
    q = torch.randn(H, B, D, device="cuda").bfloat16().transpose(0, 1)
    if paged:
        table = torch.randperm(B * pages, device="cuda")
        scattered = [torch.empty_like(x).view(-1, PAGE, *x.shape[2:]) for x in (k, v)]
        for to, x in zip(scattered, (k, v), strict=True):
            to[table] = x.view(to.shape)
        cache = KVCache(*scattered, table.view(B, pages).int())
    else:
        cache = KVCache(k[:, :capacity], v[:, :capacity])
    return q, cache, torch.tensor(lengths, device="cuda", dtype=torch.int32), tokens


def attention(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """q [H, D] against k, v [T, K, D] in FP64: output [H, Dv] and log-probabilities [H, T]."""
    H, K = q.shape[0], k.shape[1]
    logits = torch.einsum("kgd,tkd->kgt", q.double().reshape(K, H // K, -1) / math.sqrt(q.shape[1]), k.double())
    every = logits if sink is None else torch.cat([logits, sink.double().view(K, H // K, 1)], -1)
    log_probability = logits - every.logsumexp(-1, keepdim=True)
    output = torch.einsum("kgt,tkd->kgd", log_probability.exp(), v.double())
    return output.flatten(0, 1), log_probability.flatten(0, 1)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same in BF16 by PyTorch."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q[None], k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[0, :, 0]


def relative_error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())


def poison(*like: Tensor) -> None:
    """Leave NaN where the allocator will place the next tensors of these sizes."""
    for x in [torch.full_like(x, torch.nan) for x in like]:
        del x


def block_scores(log_probability: Tensor, K: int, block: int) -> Tensor:
    """[K, blocks]: the largest log-probability of the group in each block."""
    best = log_probability.view(K, -1, log_probability.shape[1]).amax(1)
    best = F.pad(best, (0, -best.shape[1] % block), value=-torch.inf)
    return best.unflatten(-1, (-1, block)).amax(-1)


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_full_layer_is_as_exact_as_flash_attention_and_selects_the_largest_scores(name, layout):
    H, K, D, Dv, block, selected, _, lengths = CASES[name]
    q, cache, on_device, tokens = example(name, layout == "paged")
    poison(*[torch.empty(len(lengths), H, Dv, device="cuda") for _ in range(3)])
    output, blocks = decode_full(q, cache, on_device, block=block, selected=selected)
    exact = [attention(q[b], k, v) for b, (k, v) in enumerate(tokens)]
    expected = torch.stack([output for output, _ in exact])
    dense = torch.stack([flash(q[b], k, v) for b, (k, v) in enumerate(tokens)])
    for b, (_, log_probability) in enumerate(exact):
        assert relative_error(output[b], expected[b]) <= 2 * relative_error(dense[b], expected[b])
        score = block_scores(log_probability, K, block)
        count = min(selected, score.shape[1])
        assert (blocks[b, :, count:] == -1).all() and (blocks[b, :, :count] >= 0).all()
        chosen = blocks[b, :, :count].long()
        assert (chosen.sort(-1).values.diff(dim=-1) > 0).all()
        # FP32 logits of size 10 and their sums: blocks may trade places where their scores are that close
        torch.testing.assert_close(score.gather(1, chosen), score.topk(count).values, rtol=0, atol=1e-5)
    again = decode_full(q, cache, on_device, block=block, selected=selected)
    assert torch.equal(output, again[0]) and torch.equal(blocks, again[1])


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_sparse_layer_is_as_exact_as_flash_attention(name, layout):
    paged = layout == "paged"
    H, K, D, Dv, block, selected, _, lengths = CASES[name]
    B = len(lengths)
    q, cache, on_device, tokens = example(name, paged)
    sinks, gates = torch.randn(2, H, device="cuda"), torch.rand(2, B, H, Dv, device="cuda").bfloat16()
    if not paged:
        gates = gates[..., 0]  # head-wise, and not contiguous
    own = [tuple(torch.randn_like(x[-WINDOW:]) for x in kv) for kv in tokens]
    ring = KVCache(*(torch.full((B, WINDOW, K, width), torch.nan, device="cuda").bfloat16() for width in (D, Dv)))
    blocks = torch.full((B, K, selected), -1, dtype=torch.int32, device="cuda")
    for b, length in enumerate(lengths):
        slots = torch.arange(max(0, length - WINDOW), length, device="cuda") % WINDOW
        ring.k[b, slots], ring.v[b, slots] = own[b]
        last = (length - 1) // block
        for head in range(K):
            chosen = torch.cat([torch.tensor([last]), torch.randperm(last)])[:selected].int()
            blocks[b, head, : len(chosen)] = chosen[torch.randperm(len(chosen))].cuda()

    def both_branches(attend) -> Tensor:
        outputs = []
        for b, (k, v) in enumerate(tokens):
            sparse = []
            for head in range(K):
                mine = blocks[b, head][blocks[b, head] >= 0].long()
                token = (mine[:, None] * block + torch.arange(block, device="cuda")).flatten()
                token = token[token < lengths[b]]
                group = slice(head * H // K, (head + 1) * H // K)
                sparse.append(attend(q[b, group], k[token, head, None], v[token, head, None], sinks[0, group]))
            near = attend(q[b], *own[b], sinks[1])
            gate = [gate[b] if paged else gate[b, :, None] for gate in gates]
            outputs.append(torch.cat(sparse) * gate[0] + near * gate[1])
        return torch.stack(outputs)

    def flash_with_sink(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        lse = attention(q, k, v, sink)[1].logsumexp(-1)  # how much the sink leaves
        return flash(q, k, v) * lse.exp().bfloat16()[:, None]

    poison(torch.empty(B, H, Dv, device="cuda", dtype=torch.bfloat16))
    options = {"block": block, "window": WINDOW, "sparse_sink": sinks[0], "window_sink": sinks[1]}
    options |= {"sparse_gate": gates[0], "window_gate": gates[1]}
    output = decode_sparse(q, cache, blocks, ring, on_device, **options)
    exact = both_branches(lambda *arguments: attention(*arguments)[0])
    for found, dense, truth in zip(output, both_branches(flash_with_sink), exact, strict=True):
        assert relative_error(found, truth) <= 2 * relative_error(dense, truth)
    assert torch.equal(output, decode_sparse(q, cache, blocks, ring, on_device, **options))


def test_caches_of_more_than_two_to_the_31_elements():
    H, K, D, capacity = 32, 8, 128, 131_072
    B = 17  # 2.3e9 elements of k, and the same memory is v
    k = torch.zeros(B, capacity, K, D, device="cuda", dtype=torch.bfloat16)
    k[-1].normal_()
    q = torch.randn(B, H, D, device="cuda").bfloat16()
    lengths = torch.full((B,), capacity, device="cuda", dtype=torch.int32)
    output, blocks = decode_full(q, KVCache(k, k), lengths, block=64, selected=16)
    expected = attention(q[-1], k[-1], k[-1])[0]
    assert relative_error(output[-1], expected) <= 2 * relative_error(flash(q[-1], k[-1], k[-1]), expected)
    assert (output[:-1] == 0).all()
    assert (blocks[:-1] == torch.arange(16, device="cuda")).all()  # all scores are equal
    pages = KVCache(k.view(-1, PAGE, K, D), k.view(-1, PAGE, K, D), torch.arange(B * 2048).view(B, 2048).int().cuda())
    again = decode_full(q, pages, lengths, block=64, selected=16)
    assert torch.equal(output, again[0]) and torch.equal(blocks, again[1])
