"""Training windows: sample number g → tensors, the same for any number of ranks, and a step's share of one rank.

B samples of a micro-batch, S tokens. The number of samples consumed so far is the whole state, and the trainer has it.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict, TypeVar

import numpy as np
import torch
import xxhash
from torch import Tensor

from data.corpus import Corpus
from data.errors import DataError
from data.order import Place, SampleOrder, quotas

Item = TypeVar("Item")


class Batch(TypedDict):
    """One sample [S], or a micro-batch [B, S]."""

    tokens: Tensor  # int64
    labels: Tensor  # int64, the token after each token
    loss_mask: Tensor  # float32, 0 where the label begins another document than the token's
    document_start: Tensor  # int32, where in the window the token's document begins: token t sees document_start[t]..t


class PackedSamples:
    """`samples[g]`: window by window, documents one after another without padding.

    Window j of a source is its tokens j·S … j·S+S, of which the last is only a label; what is left at the end of an
    epoch is dropped. S is free to change between phases: a window of 4S is four adjacent windows of S.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str | Path, float]],
        split: str,
        sequence_length: int,
        seed: int,
        *,
        mask_documents: bool = True,
        ordered: bool = False,
    ):
        """`sources` are (path, weight). `ordered` has every window once, in the order of storage: for validation."""
        if not sources:
            raise DataError("the list of data sources is empty; give at least one (path, weight)")
        if sequence_length < 1:
            raise DataError(f"sequence_length={sequence_length} must be at least 1")
        self.corpora = [Corpus(path, split) for path, _ in sources]
        self.weights = [weight for _, weight in sources]
        self.sequence_length, self.seed = sequence_length, seed
        self.mask_documents, self.ordered = mask_documents, ordered
        self.windows = [self._windows(corpus) for corpus in self.corpora]  # per source, in one epoch
        self._order = SampleOrder(self.windows, self.weights, seed)
        first = self.corpora[0]
        for other in self.corpora[1:]:
            if other.tokenizer_hash != first.tokenizer_hash:
                raise DataError(
                    f"corpora {first.path} and {other.path} have different tokenizers ({first.tokenizer_hash}, "
                    f"{other.tokenizer_hash}); prepare one with tokenizer={other.tokenizer_file} of the other"
                )
        self.vocabulary = first.vocabulary

    @property
    def fingerprint(self) -> str:
        """Of everything that decides the order of the tokens except the sequence length, which phases change."""
        parts = [corpus.fingerprint for corpus in self.corpora] + [quotas(self.weights), self.seed, self.ordered]
        return xxhash.xxh3_128_hexdigest(repr(parts).encode())

    def place(self, g: int) -> Place:
        """Source, epoch and window of sample g."""
        if g < 0:
            raise IndexError(f"sample {g}")
        if not self.ordered:
            return self._order[g]
        for source, windows in enumerate(self.windows):
            if g < windows:
                return Place(source, 0, g)
            g -= windows
        raise IndexError(f"sample beyond the {sum(self.windows)} windows of the ordered data")

    def __getitem__(self, g: int) -> Batch:
        S = self.sequence_length
        source, _, window = self.place(g)
        tokens, ends = self.corpora[source].read(window * S, S + 1)
        tokens = torch.from_numpy(tokens.astype(np.int64))
        loss_mask = np.ones(S, dtype=np.float32)
        document_start = np.zeros(S, dtype=np.int32)
        if self.mask_documents:
            ends = ends[ends <= S]
            loss_mask[ends - 1] = 0
            starts = ends[ends < S]
            document_start[starts] = starts
            document_start = np.maximum.accumulate(document_start)
        return Batch(
            tokens=tokens[:-1],
            labels=tokens[1:],
            loss_mask=torch.from_numpy(loss_mask),
            document_start=torch.from_numpy(document_start),
        )

    def _windows(self, corpus: Corpus) -> int:
        windows = (corpus.tokens - 1) // self.sequence_length
        if not windows:
            raise DataError(
                f"split {corpus.split!r} of corpus {corpus.path} has {corpus.tokens:,} tokens, one window of "
                f"sequence_length={self.sequence_length} needs {self.sequence_length + 1:,}; "
                "shorten it or prepare more text"
            )
        return windows


def micro_batches(
    samples: PackedSamples, consumed: int, global_batch: int, data_rank: int, data_size: int, micro_batch: int
) -> list[Batch]:
    """What rank `data_rank` of `data_size` computes in the step that starts after `consumed` samples: tensors [B, S].

    The global batch is samples consumed … consumed+global_batch−1; a rank has one contiguous slice of it.
    """
    if global_batch < 1 or micro_batch < 1 or global_batch % (data_size * micro_batch):
        step = data_size * max(micro_batch, 1)
        near = max(step, global_batch // step * step)
        raise DataError(
            f"global_batch={global_batch} is no multiple of {data_size} data-parallel ranks × "
            f"micro_batch={micro_batch}; use {near} or {near + step}"
        )
    share = global_batch // data_size
    first = consumed + data_rank * share
    return [
        _stack([samples[g] for g in range(start, start + micro_batch)])
        for start in range(first, first + share, micro_batch)
    ]


def prefetch(items: Iterable[Item], ahead: int = 2) -> Iterator[Item]:
    """The same items, computed by a thread up to `ahead` of the caller. Items never asked for are lost without harm."""
    finished = object()
    iterator = iter(items)
    with ThreadPoolExecutor(1, "data-prefetch") as thread:
        pending = deque(thread.submit(next, iterator, finished) for _ in range(ahead))
        while (item := pending.popleft().result()) is not finished:
            pending.append(thread.submit(next, iterator, finished))
            yield item


def _stack(batch: list[Batch]) -> Batch:
    return Batch(**{name: torch.stack([sample[name] for sample in batch]) for name in Batch.__annotations__})
