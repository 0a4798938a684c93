"""A global shuffle of more documents than fit in memory, in two sequential passes over a scratch folder.

Every document gets a random key from (seed, its number); documents are first scattered into buckets by the leading part
of the key, then each bucket is sorted in memory. The result is the order of the keys, however many buckets there are.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

RECORD = np.dtype([("key", "<u8"), ("number", "<u8"), ("tokens", "<u4"), ("hash", "<u8")])
BUCKET_BYTES = 256 << 20  # input per bucket that is aimed at; a bucket is what has to fit in memory
MAX_BUCKETS = 400  # two open files each, below the usual limit of 1,024


class Shuffle:
    """`add` every document, then iterate once: (tokens, hash) in the order of the keys."""

    def __init__(self, scratch: Path, input_bytes: int, dtype: np.dtype, seed: int):
        self.documents = 0
        self._seed, self._dtype = seed, dtype
        self._buckets = min(MAX_BUCKETS, 1 + input_bytes // BUCKET_BYTES)
        self._token_paths = [scratch / f"bucket-{i:03d}.tokens" for i in range(self._buckets)]
        self._record_paths = [scratch / f"bucket-{i:03d}.records" for i in range(self._buckets)]
        self._open = contextlib.ExitStack()
        self._token_files = [self._open.enter_context(open(path, "wb")) for path in self._token_paths]
        self._record_files = [self._open.enter_context(open(path, "wb")) for path in self._record_paths]

    def add(self, tokens: np.ndarray, document_hash: int) -> None:
        key = xxhash.xxh3_64_intdigest(self.documents.to_bytes(8, "little"), self._seed)
        bucket = key * self._buckets >> 64
        self._token_files[bucket].write(tokens.astype(self._dtype).data)
        record = np.array((key, self.documents, len(tokens), document_hash), dtype=RECORD)
        self._record_files[bucket].write(record.tobytes())
        self.documents += 1

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        self.close()
        for token_path, record_path in zip(self._token_paths, self._record_paths, strict=True):
            tokens, records = np.fromfile(token_path, self._dtype), np.fromfile(record_path, RECORD)
            token_path.unlink()  # so that the scratch shrinks as the shards grow
            record_path.unlink()
            ends = np.cumsum(records["tokens"], dtype=np.int64)
            for i in np.lexsort((records["number"], records["key"])):
                yield tokens[ends[i] - records["tokens"][i] : ends[i]], int(records["hash"][i])

    def close(self) -> None:
        self._open.close()
