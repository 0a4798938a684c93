"""The reference operators against PyTorch's own attention, loops over tokens in Python's FP64, and algebra.

The sizes divide each other badly on purpose: 37 tokens in blocks of 8, documents that begin inside a block.
"""

import dataclasses
import math
import random
from dataclasses import dataclass
from itertools import accumulate, product

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import reference

S, H, K, D = 37, 4, 2, 8
BLOCK, SELECTED, WINDOW = 8, 3, 5
FP32 = dict(rtol=1e-5, atol=1e-5)  # sums of 37 terms of size 1 to 10 and FP32's 6e-8; measured: 2e-6
DOCUMENTS = {"one document": [(S,), (S,)], "packed": [(13, 1, 23), (5, 32)]}  # lengths in each of two sequences


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Example:
    q: Tensor  # [B, S, H, D]
    k: Tensor  # [B, S, K, D]
    v: Tensor  # [B, S, K, D]
    sink: Tensor  # [H]
    document_start: Tensor  # [B, S]
    blocks: Tensor  # [B, K, S, 4]: the query's own block, two others, one -1, in any order

    def to(self, *, dtype: torch.dtype | None = None, device: str | None = None) -> "Example":
        def move(x: Tensor) -> Tensor:
            x = x.detach().to(device=device, dtype=dtype if x.is_floating_point() else None)
            return x.requires_grad_(x.is_floating_point())

        return Example(*(move(getattr(self, field.name)) for field in dataclasses.fields(self)))


def example(documents=DOCUMENTS["packed"], tokens: int = S, seed: int = 0) -> Example:
    B = len(documents)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, tokens, heads, D, generator=generator) for heads in (H, K, K))
    sink = torch.randn(H, generator=generator)
    choice = random.Random(seed)

    def block_list(own: int) -> list[int]:
        others = [j for j in range(-(-tokens // BLOCK)) if j != own]
        return choice.sample([own, -1, *choice.sample(others, 2)], 4)

    blocks = [[[block_list(t // BLOCK) for t in range(tokens)] for _ in range(K)] for _ in range(B)]
    return Example(2 * q, k, v, sink, document_starts(documents), torch.tensor(blocks, dtype=torch.int32)).to()


def document_starts(documents) -> Tensor:
    rows = []
    for lengths in documents:
        starts = accumulate(lengths, initial=0)
        rows.append([start for start, length in zip(starts, lengths, strict=False) for _ in range(length)])
    return torch.tensor(rows, dtype=torch.int32)


OPERATORS = {
    "causal": lambda x: reference.causal_attention(x.q, x.k, x.v, x.document_start),
    "scored": lambda x: reference.scored_attention(x.q, x.k, x.v, x.document_start, BLOCK, SELECTED)[0],
    "sparse": lambda x: reference.sparse_attention(x.q, x.k, x.v, x.blocks, x.document_start, BLOCK, None),
    "sparse, sink": lambda x: reference.sparse_attention(x.q, x.k, x.v, x.blocks, x.document_start, BLOCK, x.sink),
    "window": lambda x: reference.window_attention(x.q, x.k, x.v, x.document_start, WINDOW, None),
    "window, sink": lambda x: reference.window_attention(x.q, x.k, x.v, x.document_start, WINDOW, x.sink),
}


def with_gradients(name: str, x: Example, operator=None) -> dict[str, Tensor]:
    """The output of an operator and the gradient of every input for one gradient of the output."""
    output = (operator or OPERATORS[name])(x)
    inputs = {"q": x.q, "k": x.k, "v": x.v} | ({"sink": x.sink} if "sink" in name else {})
    gradients = torch.autograd.grad(output, list(inputs.values()), probe_like(output))
    return {"output": output.detach()} | dict(zip(inputs, gradients, strict=True))


def probe_like(output: Tensor) -> Tensor:
    """A fixed gradient of the output, the same in every dtype."""
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(output)


def mask_of(name: str, x: Example) -> Tensor:
    """[B, H, S, S]: which keys each query of each head may see, token by token from the operators' descriptions."""
    B, tokens = x.document_start.shape
    start, blocks = x.document_start.tolist(), x.blocks.tolist()

    def sees(b: int, h: int, t: int, i: int) -> bool:
        if not start[b][t] <= i <= t:
            return False
        if "sparse" in name:
            return i // BLOCK in blocks[b][h // (H // K)][t]
        return "window" not in name or t - i < WINDOW

    every = product(range(B), range(H), range(tokens), range(tokens))
    return torch.tensor([sees(*place) for place in every]).view(B, H, tokens, tokens)


def dense(x: Example, mask: Tensor, sink: bool) -> Tensor:
    """Eq. 2, 5 and 7 as they are printed, over an explicit mask, in FP64; a sink is one more exp() below the line."""
    k, v = (y.double().repeat_interleave(H // K, dim=2) for y in (x.k, x.v))
    above = torch.einsum("bthd,bihd->bhti", x.q.double(), k).div(math.sqrt(D)).exp() * mask
    below = above.sum(-1, keepdim=True) + (x.sink.double().exp().view(H, 1, 1) if sink else 0)
    return torch.einsum("bhti,bihd->bthd", above / below, v)


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("name", OPERATORS)
def test_outputs_and_gradients_equal_dense_attention_over_an_explicit_mask(name, documents):
    x = example(documents)
    mask = mask_of(name, x)
    expected = with_gradients(name, x, lambda x: dense(x, mask, sink="sink" in name))
    assert expected["output"].dtype == torch.float64
    assert_close(with_gradients(name, x), expected, **FP32, check_dtype=False)


# Full attention


def pytorch_attention(x: Example, **mask) -> Tensor:
    q, k, v = (y.double().transpose(1, 2) for y in (x.q, x.k, x.v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **mask).transpose(1, 2).float()


def test_causal_attention_is_pytorchs_own_with_grouped_heads():
    x = example(DOCUMENTS["one document"])
    assert_close(OPERATORS["causal"](x), pytorch_attention(x, is_causal=True), **FP32)


def test_a_packed_document_attends_as_if_it_were_alone():
    x = example(DOCUMENTS["packed"])
    output = OPERATORS["causal"](x)
    for b, lengths in enumerate(DOCUMENTS["packed"]):
        for part in torch.arange(S).split(lengths):
            alone = Example(*(y[b : b + 1, part] for y in (x.q, x.k, x.v)), x.sink, x.document_start, x.blocks)
            assert_close(output[b : b + 1, part], pytorch_attention(alone, is_causal=True), **FP32)


def test_scored_attention_attends_like_causal_attention():
    x = example()
    assert_close(with_gradients("scored", x), with_gradients("causal", x), rtol=0, atol=0)  # the same sums


# The selection


def blocks_by_eq_3(q: list, k: list, start: list, block: int, selected: int) -> Tensor:
    """Eq. 3 and the group maximum in loops: every probability, the largest of each block, ranked; ties to the lower."""
    G = len(q[0][0]) // len(k[0][0])
    chosen = []
    for b, g, t in product(range(len(q)), range(len(k[0][0])), range(len(q[0]))):
        score: dict[int, float] = {}
        for query in q[b][t][g * G : (g + 1) * G]:
            tokens = range(start[b][t], t + 1)
            dots = [sum(a * c for a, c in zip(query, k[b][i][g], strict=True)) for i in tokens]
            above = [math.exp(dot / math.sqrt(len(query))) for dot in dots]
            for i, exp in zip(tokens, above, strict=True):
                score[i // block] = max(score.get(i // block, 0), exp / sum(above))
        ranked = sorted(score, key=lambda j: (-score[j], j))[:selected]
        chosen.append(ranked + [-1] * (selected - len(ranked)))
    return torch.tensor(chosen, dtype=torch.int32).view(len(q), -1, len(q[0]), selected)


def chosen_blocks(q: Tensor, k: Tensor, block: int, selected: int, document_start: Tensor | None = None) -> Tensor:
    start = torch.zeros(q.shape[:2], dtype=torch.int64) if document_start is None else document_start
    return reference.scored_attention(q, k, torch.zeros_like(k), start, block, selected)[1]


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("block, selected", [(8, 3), (8, 5), (5, 16), (1, 7), (64, 2)])
def test_blocks_are_those_of_eq_3_by_falling_probability_and_padded(documents, block, selected):
    x = example(documents)
    expected = blocks_by_eq_3(x.q.tolist(), x.k.tolist(), x.document_start.tolist(), block, selected)
    blocks = chosen_blocks(x.q, x.k, block, selected, x.document_start)
    assert blocks.dtype == torch.int32
    assert_close(blocks.sort().values, expected.sort().values, rtol=0, atol=0)  # as sets
    assert_close(blocks, expected, rtol=0, atol=0)  # no two scores are within 6e-5 of themselves, FP32 errs by 1e-6


def test_all_blocks_with_a_visible_token_are_candidates_and_no_others():
    x = example(DOCUMENTS["packed"])
    blocks = chosen_blocks(x.q, x.k, BLOCK, 16, x.document_start).tolist()
    start = x.document_start.tolist()
    for b, g, t in product(range(2), range(K), range(S)):
        candidates = list(range(start[b][t] // BLOCK, t // BLOCK + 1))
        found = blocks[b][g][t]
        assert sorted(found[: len(candidates)]) == candidates
        assert found[len(candidates) :] == [-1] * (16 - len(candidates))


def test_equal_scores_go_to_the_lower_block():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randint(-1, 2, (1, 64, 2, 4), generator=generator).float() for _ in range(2))
    expected = blocks_by_eq_3(q.tolist(), k.tolist(), [[0] * 64], 4, 6)  # logits are halves of integers: exact ties
    assert_close(chosen_blocks(q, k, 4, 6), expected, rtol=0, atol=0)
    assert chosen_blocks(0 * q, k, 4, 6)[0, 0, -1].tolist() == [0, 1, 2, 3, 4, 5]


def test_the_group_maximum_is_over_probabilities_and_not_over_logits():
    """Head 0 has the large logits, 10 and more everywhere, so no token has much of it; head 1 is sure of block 1."""
    q, k = torch.zeros(1, 32, 2, 4), torch.zeros(1, 32, 1, 4)
    q[..., 0, 0], k[..., 0] = 20, 1
    k[:, 16:24, :, 0] = 1.01  # logit 10.1 in block 2, probability 1/31
    q[..., 1, 1], k[:, 9, :, 1] = 12, 1  # logit 6 for one token of block 1, probability 0.93
    logits = torch.einsum("bthd,bid->bhti", q, k[:, :, 0]) / 2
    assert logits[0, :, -1].amax(0).argmax() in range(16, 24)  # what the logits alone would choose
    assert chosen_blocks(q, k, 8, 2)[0, 0, -1].tolist() == [1, 2]
    assert blocks_by_eq_3(q.tolist(), k.tolist(), [[0] * 32], 8, 2)[0, 0, -1].tolist() == [1, 2]


def test_a_very_sure_head_still_ranks_blocks_whose_probability_underflows():
    q, k = torch.full((1, 20, 1, 4), 2.0), torch.zeros(1, 20, 1, 4)
    k[0, :, 0, 0] = torch.tensor([-200.0, 100.0, -300.0, 300.0, 0.0]).repeat_interleave(4)  # the logit of each block
    probability = torch.einsum("bthd,bihd->bhti", q, k).div(2).softmax(-1)[0, 0, -1]
    assert (probability > 0).sum() == 4  # FP32 knows the first block only
    assert chosen_blocks(q, k, 4, 5)[0, 0, -1].tolist() == [3, 1, 4, 0, 2]


def test_no_gradient_flows_through_the_selection():
    x = example()
    output, blocks = reference.scored_attention(x.q, x.k, x.v, x.document_start, BLOCK, SELECTED)
    assert output.requires_grad and not blocks.requires_grad and blocks.grad_fn is None


# Sparse attention


def test_sparse_attention_over_all_blocks_is_causal_attention():
    x = example()
    x.blocks = torch.stack([torch.randperm(5) for _ in range(2 * K * S)]).view(2, K, S, 5)
    assert_close(with_gradients("sparse", x), with_gradients("causal", x), rtol=0, atol=0)  # the same sums


def test_minus_one_in_the_list_selects_nothing():
    x = example(DOCUMENTS["one document"])

    def attend(block_list: list[int], sink: Tensor | None = None) -> Tensor:
        x.blocks = torch.tensor(block_list, dtype=torch.int32).expand(2, K, S, -1)
        return reference.sparse_attention(x.q, x.k, x.v, x.blocks, x.document_start, BLOCK, sink)

    assert_close(attend([-1, 0, -1]), attend([0]), rtol=0, atol=0)
    assert not torch.equal(attend([0]), attend([0, 4]))  # block 4 is where an index of -1 would lead
    assert_close(attend([-1, -1], x.sink), torch.zeros_like(x.q), rtol=0, atol=0)  # all goes to the sink


def test_blocks_of_one_layer_can_be_read_by_the_next():
    """From the selection to the sparse branch: queries with no more blocks than are selected lose nothing."""
    x = example(DOCUMENTS["one document"])
    output, x.blocks = reference.scored_attention(x.q, x.k, x.v, x.document_start, BLOCK, SELECTED)
    sparse = OPERATORS["sparse"](x)
    assert_close(sparse[:, : SELECTED * BLOCK], output[:, : SELECTED * BLOCK], rtol=0, atol=0)
    assert (sparse - output)[:, SELECTED * BLOCK :].abs().amax(-1).min() > 0


# Window attention


@pytest.mark.parametrize("window", [1, 5, S, 2 * S])
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_window_attention_is_pytorchs_own_over_a_band(documents, window):
    x = example(documents)
    band = torch.ones(S, S, dtype=torch.bool).tril().triu(1 - window)
    same = x.document_start[:, :, None] == x.document_start[:, None]
    expected = pytorch_attention(x, attn_mask=(band & same)[:, None])
    assert_close(reference.window_attention(x.q, x.k, x.v, x.document_start, window, None), expected, **FP32)


# The sink


@pytest.mark.parametrize("name", ["sparse", "window"])
def test_the_sink_rescales_by_the_sigmoid_of_log_sum_exp_minus_sink(name):
    x = example()
    logits = torch.einsum("bthd,bihd->bhti", x.q.double(), x.k.double().repeat_interleave(2, dim=2)) / math.sqrt(D)
    lse = logits.masked_fill(~mask_of(name, x), -math.inf).logsumexp(-1).transpose(1, 2)  # [B, S, H]
    share = (lse - x.sink).sigmoid()[..., None].float()  # what the sink leaves
    without, found = OPERATORS[name](x), with_gradients(f"{name}, sink", x)
    assert_close(found["output"], without * share, **FP32)
    sink_gradient = -(probe_like(without) * without * share * (1 - share)).sum((0, 1, 3))  # the derivative of sigmoid
    assert_close(found["sink"], sink_gradient, rtol=1e-5, atol=1e-5)  # sums of 592 terms


# Chunks, precision, memory


@pytest.mark.parametrize("name", OPERATORS)
def test_chunks_of_queries_change_nothing(name, monkeypatch):
    x, results = example(), {}
    for chunk in (7, 10_000):
        monkeypatch.setattr(reference, "QUERY_CHUNK", chunk)
        results[chunk] = with_gradients(name, x)
        with torch.no_grad():
            assert_close(OPERATORS[name](x), results[chunk]["output"], rtol=0, atol=0)
    assert_close(results[7], results[10_000], **FP32)


def test_chunks_of_queries_select_the_same_blocks(monkeypatch):
    x = example()
    blocks = chosen_blocks(x.q, x.k, BLOCK, SELECTED, x.document_start)
    monkeypatch.setattr(reference, "QUERY_CHUNK", 7)
    assert_close(chosen_blocks(x.q, x.k, BLOCK, SELECTED, x.document_start), blocks, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPERATORS)
def test_bfloat16_is_rounded_once_at_the_end(name, monkeypatch):
    monkeypatch.setattr(reference, "QUERY_CHUNK", 4)  # gradients of k, v and sink are sums over ten chunks
    x = example().to(dtype=torch.bfloat16)
    found, expected = with_gradients(name, x), with_gradients(name, x.to(dtype=torch.float32))
    assert {y.dtype for y in found.values()} == {torch.bfloat16}
    assert_close(found, expected, rtol=2**-8, atol=1e-6, check_dtype=False)  # half the distance of neighbours


class LiveBytes(TorchDispatchMode):
    """The most bytes that the tensors made under it held at one time."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.live = {key: (owner, size) for key, (owner, size) in self.live.items() if not owner.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


@pytest.mark.parametrize("name", OPERATORS)
def test_memory_of_a_training_step_grows_linearly_with_the_sequence(name, monkeypatch):
    def growth(*chunks: int) -> float:
        peaks = []
        for tokens, chunk in zip((256, 512), chunks, strict=True):
            monkeypatch.setattr(reference, "QUERY_CHUNK", chunk)
            x = example([(tokens,)], tokens)
            with LiveBytes() as memory:
                with_gradients(name, x)
            peaks.append(memory.peak)
        return peaks[1] / peaks[0]

    assert growth(16, 16) < 2.02  # 16 chunks, then 32; one mask of S x S through the forward pass makes it 2.06
    assert growth(256, 512) > 3.5  # one chunk holds S x S: the meter sees it
