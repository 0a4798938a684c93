"""What every launch checks, and the tensors as the copy engine takes them."""

import re

import pytest
import torch

from kernels.arguments import (
    check_blocks,
    check_gate,
    check_qkv,
    check_queries,
    check_starts,
    loadable,
    sink_of_heads,
)
from kernels.errors import KernelError


def qkv(*, B: int = 2, S: int = 5, H: int = 4, K: int = 2, D: int = 32, DV: int = 32) -> dict:
    q, k, v = (torch.zeros(shape, dtype=torch.float16) for shape in ((B, S, H, D), (B, S, K, D), (B, S, K, DV)))
    return {"q": q, "k": k, "v": v, "document_start": torch.zeros(B, S, dtype=torch.int32)}


WRONG = {  # what the message says: the arguments
    "q has shape .* four dimensions": qkv() | {"q": qkv()["q"][0]},
    "v has shape .* four dimensions": qkv() | {"v": qkv()["v"][0]},
    "q is torch.float64; the Triton kernels take bfloat16 or float16": qkv() | {"q": qkv()["q"].double()},
    "k is torch.bfloat16 on cpu, q is torch.float16": qkv() | {"k": qkv()["k"].bfloat16()},
    "v is torch.float16 on meta, q is torch.float16 on cpu": qkv() | {"v": qkv()["v"].to("meta")},
    r"k \[2, 5, 2, 32\] and v \[2, 5, 1, 32\] must be \[2, T, K, D\] like q": qkv() | {"v": qkv(K=1)["v"]},
    r"k \[1, 5, 2, 32\] and v": qkv() | {name: qkv(B=1)[name] for name in "kv"},
    "q has head dimension 32, k 64": qkv() | {"k": qkv(D=64)["k"]},
    "q and v have head dimensions 36 and 32; the kernels take multiples of 8": qkv(D=36),
    "q and v have head dimensions 32 and 8;": qkv(DV=8),
    "q and v have head dimensions 320 and 32;": qkv(D=320),
    "q has 5 heads, no multiple of the 2 of k": qkv(H=5),
    r"k has shape \[2, 5, 0, 32\]; it must hold something": qkv(K=0),
    r"q has shape \[2, 0, 4, 32\]; it must hold something": qkv(S=0),
    r"document_start is torch.int64 .* must be int32 \[2, 5\]": (
        qkv() | {"document_start": torch.zeros(2, 5, dtype=torch.int64)}
    ),
    r"document_start is torch.int32 \[2, 4\]": qkv() | {"document_start": torch.zeros(2, 4, dtype=torch.int32)},
    "document_start is .* on meta; .* on cpu": qkv() | {"document_start": qkv()["document_start"].to("meta")},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_tensor_is_named(message):
    check_qkv(**qkv())
    with pytest.raises(KernelError, match=message):
        check_qkv(**WRONG[message])


def test_the_caller_says_what_its_arguments_are_called():
    with pytest.raises(KernelError, match="q has head dimension 32, cache.k 64"):
        check_qkv(*list((qkv() | {"k": qkv(D=64)["k"]}).values()), names="q cache.k cache.v")


@pytest.mark.parametrize("query_start", [-1, 4])
def test_queries_that_reach_past_the_keys_are_named(query_start):
    q, k = qkv()["q"], qkv(S=8)["k"]
    check_queries(q, k, 3)
    with pytest.raises(KernelError, match=f"query_start {query_start} and 5 queries q reach past the 8 keys of k"):
        check_queries(q, k, query_start)


def test_a_group_that_fills_no_tile_is_named():
    with pytest.raises(KernelError, match="q has 3 heads for each of k; the kernels take a power of two"):
        check_queries(*[qkv(H=6)[name] for name in "qk"], 0)


@pytest.mark.parametrize("block", [-2, 10, 2**31 - 1])
def test_an_impossible_block_and_its_place_are_named_when_debugging(block, monkeypatch):
    blocks = torch.full((2, 3, 4, 5), -1, dtype=torch.int32)
    blocks[0, ..., 0], blocks[1, 2] = 9, torch.arange(5)
    monkeypatch.setenv("HYSPARSE_DEBUG", "1")
    check_blocks(blocks, 10)
    blocks[1, 2, 3, 4] = block
    with pytest.raises(KernelError, match=rf"blocks\[1, 2, 3, 4\] is {block}; .* one of the 10 key blocks"):
        check_blocks(blocks, 10)
    monkeypatch.delenv("HYSPARSE_DEBUG")
    check_blocks(blocks, 10)


@pytest.mark.parametrize("listed", [[3, 1, 3, -1], [-1, 3, 1, 2], [3, -1, 1, -1]])
def test_a_block_that_is_listed_twice_or_behind_the_end_is_named_when_debugging(listed, monkeypatch):
    blocks = torch.tensor([[[3, 1, 2, -1], listed]], dtype=torch.int32)
    check_blocks(blocks, 4)
    monkeypatch.setenv("HYSPARSE_DEBUG", "1")
    check_blocks(blocks[:, :1], 4)
    with pytest.raises(KernelError, match=rf"blocks\[0, 1\] is {re.escape(str(listed))}; a list names each block once"):
        check_blocks(blocks, 4)


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([10, 10, 9], r"\[1, 2\] is 9; .* between 10, .* and 12,"),
        ([10, 12, 12], r"\[1, 1\] is 12; .* between 10, .* 11,"),
        ([-1, 10, 12], r"\[1, 0\] is -1; .* between 0, .* 10,"),
    ],
)
def test_documents_that_overlap_or_start_behind_their_query_are_named_when_debugging(starts, message, monkeypatch):
    right = [0, 11, 12]
    monkeypatch.setenv("HYSPARSE_DEBUG", "1")
    check_starts(torch.tensor([right, right], dtype=torch.int32), 10)
    with pytest.raises(KernelError, match=f"document_start{message}"):
        check_starts(torch.tensor([right, starts], dtype=torch.int32), 10)


def test_what_the_copy_engine_can_read_is_not_copied():
    x = torch.zeros(2, 8, 4, 32, dtype=torch.float16)
    for view in (x, x[:, 1:], x[:, :, ::2], x.transpose(1, 2), x[..., 8:24]):
        assert loadable(view) is view
    for view in (x[..., 1:], x[..., ::2], x[:, :1].expand(2, 3, 4, 32), torch.zeros(2, 8, 4, 20).half()[..., :16]):
        assert loadable(view) is not view
        assert loadable(view).stride(-1) == 1


def test_what_is_contiguous_but_starts_or_steps_at_odd_places_is_copied():
    flat = torch.randn(4 + 2 * 8 * 32).half()
    for x in (flat[4:].view(1, 2, 8, 32), torch.randn(1, 1, 1, 20).half()[..., :16]):
        assert loadable(x).data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in loadable(x).stride()[:-1])
        assert torch.equal(loadable(x), x)


def test_a_sink_is_one_number_a_head_side_by_side():
    q, both = qkv()["q"], torch.randn(4, 2)
    assert sink_of_heads(None, q) is None
    assert torch.equal(sink_of_heads(both[:, 0], q), both[:, 0]) and sink_of_heads(both[:, 0], q).stride() == (1,)
    with pytest.raises(KernelError, match=r"sink has shape \[2\] .* must be \[4\]"):
        sink_of_heads(both[0], q)
    with pytest.raises(KernelError, match="sink has shape .* on meta; .* on cpu"):
        sink_of_heads(both[:, 0].to("meta"), q)


def test_a_gate_has_the_heads_of_q_and_when_debugging_values_of_a_sigmoid(monkeypatch):
    q, gate = qkv()["q"], torch.rand(2, 5, 4)
    check_gate(None, q, "gate")
    with pytest.raises(KernelError, match=r"gate has shape \[2, 5, 2\] .* must be \[2, 5, 4\]"):
        check_gate(gate[..., :2], q, "gate")
    check_gate(3 * gate - 1, q, "gate")
    monkeypatch.setenv("HYSPARSE_DEBUG", "1")
    check_gate(gate, q, "gate")
    with pytest.raises(KernelError, match="gate has values from -.* it must be in 0 to 1"):
        check_gate(3 * gate - 1, q, "gate")
