"""What the benchmark runs on: the attention shapes of the paper's models, and selections of blocks of every kind."""

from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

DIMENSION, BLOCK, SELECTED, WINDOW = 128, 64, 16, 128
DEVICE = "cuda"
CAPTURE = Path(__file__).parent / "captured_blocks.npz"
QUERY_CHUNK = 4096  # queries whose random selection is drawn at once


@dataclass(frozen=True)
class Case:
    """One sequence of one model: `shape` is 80b or 7b."""

    shape: str
    length: int

    @property
    def heads(self) -> int:
        return SHAPES[self.shape][0]

    @property
    def kv_heads(self) -> int:
        return SHAPES[self.shape][1]

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def queries(self) -> Tensor:
        return self._random(self.heads)

    def keys(self) -> Tensor:
        return self._random(self.kv_heads)

    def one_document(self) -> Tensor:
        return torch.zeros(1, self.length, dtype=torch.int32, device=DEVICE)

    def packed_documents(self, average: int = 1024) -> list[int]:
        """Lengths of documents that fill the sequence, cut at random places."""
        cuts = torch.randperm(self.length - 1)[: self.length // average - 1].add(1).sort().values.tolist()
        return [stop - start for start, stop in zip([0, *cuts], [*cuts, self.length], strict=True)]

    def _random(self, heads: int) -> Tensor:
        return torch.randn(1, self.length, heads, DIMENSION, device=DEVICE, dtype=torch.bfloat16)


SHAPES = {"80b": (64, 4), "7b": (32, 8)}  # query heads, KV heads


def random_blocks(case: Case) -> Tensor:
    """Every token chooses among all blocks up to its own with equal chance."""
    chunks = []
    key_blocks = max(-(-case.length // BLOCK), SELECTED)
    for start in range(0, case.length, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, case.length)
        last = torch.arange(start, stop, device=DEVICE)[:, None] // BLOCK
        score = torch.rand(1, case.kv_heads, stop - start, key_blocks, device=DEVICE)
        score.masked_fill_(torch.arange(key_blocks, device=DEVICE) > last, -1)
        score, block = score.topk(SELECTED, dim=-1)
        chunks.append(block.int().masked_fill_(score < 0, -1))
    return torch.cat(chunks, dim=2)


def captured_blocks(case: Case) -> Tensor | None:
    """What a trained full layer chose: `blocks` [K, S, n] of `captured_blocks.npz`, -1 where unused.

    The capture's KV heads are repeated for a model with more. A longer sequence is made of repetitions, each of which
    chooses within itself, as packed documents would. None where no capture is there.
    """
    if not CAPTURE.exists():
        return None
    blocks = torch.from_numpy(numpy.load(CAPTURE)["blocks"]).int().to(DEVICE)
    heads, length, _ = blocks.shape
    blocks = blocks.repeat(-(-case.kv_heads // heads), 1, 1)[: case.kv_heads]
    parts = []
    for start in range(0, case.length, length):
        part = blocks[:, : case.length - start]
        parts.append(torch.where(part < 0, part, part + start // BLOCK))
    return torch.cat(parts, dim=1)[None].contiguous()


def disjoint_blocks(case: Case) -> Tensor:
    """Neighbouring tokens share no block as long as there are enough: the largest unions, the worst case."""
    return _modulo(case, torch.arange(case.length, device=DEVICE)[:, None] * SELECTED)


def equal_blocks(case: Case) -> Tensor:
    """All tokens choose the first blocks: the smallest unions, but a few key blocks get all the gradients."""
    return _modulo(case, torch.zeros(case.length, 1, dtype=torch.long, device=DEVICE))


def _modulo(case: Case, first: Tensor) -> Tensor:
    """Blocks first, first + 1, ... [S, n], counted around those that the token sees."""
    visible = torch.arange(case.length, device=DEVICE)[:, None] // BLOCK + 1
    slot = torch.arange(SELECTED, device=DEVICE)
    blocks = ((first + slot) % visible).masked_fill(slot >= visible, -1).int()
    return blocks.expand(1, case.kv_heads, -1, -1).contiguous()


SELECTIONS = {
    "random": random_blocks,
    "captured": captured_blocks,
    "disjoint (worst)": disjoint_blocks,
    "equal (hot)": equal_blocks,
}


def document_starts(lengths: list[int]) -> Tensor:
    """document_start [1, S] of documents of these lengths."""
    length = torch.tensor(lengths, device=DEVICE)
    return (length.cumsum(0) - length).repeat_interleave(length).int()[None]


def selected_pairs(blocks: Tensor) -> int:
    """Query-key pairs over all KV heads of the visible selected tokens; blocks [B, K, S, n] of one document."""
    position = torch.arange(blocks.shape[2], device=blocks.device)[:, None]
    visible = (position + 1 - blocks.long() * BLOCK).clamp(0, BLOCK)
    return int(visible.masked_fill_(blocks < 0, 0).sum())


def causal_pairs(length: int, window: int | None = None) -> int:
    """Query-key pairs of one causal head, at most `window` a query."""
    reach = min(window or length, length)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def union_size(blocks: Tensor, tokens: int = 8) -> float:
    """How many distinct blocks so many neighbouring tokens select together, on average; blocks [B, K, S, n]."""
    tiles = blocks.unflatten(2, (-1, tokens)).flatten(-2).sort(dim=-1).values
    first = torch.cat([torch.ones_like(tiles[..., :1], dtype=torch.bool), tiles[..., 1:] != tiles[..., :-1]], dim=-1)
    return (first & (tiles >= 0)).sum(-1).float().mean().item()
