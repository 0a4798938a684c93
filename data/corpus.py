"""One split of a prepared corpus as one long stream of tokens, read at random without copies.

Opening looks at names and sizes only. The bytes of a chunk are compared with its checksum the first time it is touched;
damage is an error that names the place, never a wrong token.
"""

import mmap
import shlex
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from data.errors import DataError
from data.shards import (
    DOCLEN_DTYPE,
    MANIFEST,
    TOKENIZER,
    Shard,
    checksum,
    chunk_key,
    index_path,
    read_index,
    read_manifest,
    token_dtype,
)

MAX_OPEN_SHARDS = 256  # each mapping holds a file descriptor, of which a process usually has 1,024


class Span(NamedTuple):
    """Consecutive tokens of the stream."""

    tokens: np.ndarray  # [length] uint16 or uint32, a view of the shard's pages if it lies in one chunk; read-only
    document_ends: (
        np.ndarray
    )  # int64, ascending, in 1..length: index after the last token of each document that ends here


class Corpus:
    """`Corpus(path, split)`: the tokens of one split, in the order they were written."""

    def __init__(self, path: str | Path, split: str):
        self.path, self.split = Path(path), split
        manifest = self._manifest = self._open_manifest()
        if split not in manifest["splits"]:
            have = ", ".join(manifest["splits"])
            raise DataError(
                f"corpus {self.path} has no split {split!r}, it has {have}; use one of them"
                + (", or prepare it again with validation=0.01" if split == "validation" else "")
            )
        try:
            self.vocabulary: int = manifest["vocabulary"]  # ids are below it
            self.eos: int = manifest["eos"]  # last token of every document
            self.tokens: int = manifest["splits"][split]["tokens"]
            self.documents: int = manifest["splits"][split]["documents"]
            self.tokenizer_hash: str = manifest["tokenizer"]["hash"]
            self.shards = [Shard(**shard) for shard in manifest["splits"][split]["shards"]]
        except (KeyError, TypeError) as error:
            raise DataError(f"{self.path / MANIFEST} is damaged ({error!r}); {self._repair()}") from None
        self._dtype = token_dtype(self.vocabulary)
        self._check_files()

        indexes = [self._open_index(shard) for shard in self.shards]
        self._index = np.concatenate(indexes)  # [chunks]
        self._shard_of = np.repeat(np.arange(len(indexes)), [len(index) for index in indexes])  # [chunks]
        self._first_chunk = np.cumsum([0] + [len(index) for index in indexes])  # [shards + 1]
        self._starts = np.cumsum(np.append(0, self._index["tokens"].astype(np.int64)))  # [chunks + 1] in the stream
        self._sound = np.zeros(len(self._index), dtype=bool)
        self._maps: dict[int, mmap.mmap] = {}

    @property
    def tokenizer_file(self) -> Path:
        return self.path / TOKENIZER

    @property
    def fingerprint(self) -> str:
        """Changes when any token of the split or the tokenizer does; does not depend on where the corpus lies."""
        parts = [self.split, self.tokenizer_hash, *(shard.hash for shard in self.shards)]
        return xxhash.xxh3_128_hexdigest("\n".join(parts).encode())

    def read(self, start: int, length: int) -> Span:
        """Tokens start … start+length−1 of the stream."""
        if not 0 <= start <= start + length <= self.tokens:
            raise IndexError(f"tokens {start}..{start + length} of a stream of {self.tokens}")
        tokens, ends = [], []
        chunk = int(np.searchsorted(self._starts, start, side="right")) - 1
        done = 0
        while done < length:
            chunk_tokens, doclen = self._chunk(chunk)
            skip = start + done - int(self._starts[chunk])
            piece = chunk_tokens[skip : skip + length - done]
            chunk_ends = np.cumsum(doclen, dtype=np.int64) - skip
            ends.append(chunk_ends[(chunk_ends > 0) & (chunk_ends <= len(piece))] + done)
            tokens.append(piece)
            done += len(piece)
            chunk += 1
        if len(tokens) == 1:
            return Span(tokens[0], ends[0])
        empty = np.empty(0, self._dtype), np.empty(0, np.int64)  # length 0
        return Span(np.concatenate([*tokens, empty[0]]), np.concatenate([*ends, empty[1]]))

    def _chunk(self, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """Views of a chunk's tokens and document lengths, checked the first time."""
        record = self._index[chunk]
        shard = int(self._shard_of[chunk])
        content = self._map(shard)
        tokens = np.frombuffer(content, self._dtype, int(record["tokens"]), int(record["tokens_at"]))
        doclen = np.frombuffer(content, DOCLEN_DTYPE, int(record["documents"]), int(record["doclen_at"]))
        if not self._sound[chunk]:
            if checksum(tokens.data, doclen.data) != record["checksum"]:
                name = self.shards[shard].name
                key = chunk_key(name, chunk - int(self._first_chunk[shard]))
                raise DataError(f"chunk {key} of {self.path / name} is damaged (checksum); {self._repair()}")
            self._sound[chunk] = True
        return tokens, doclen

    def _map(self, shard: int) -> mmap.mmap:
        """The shard's bytes. The oldest mapping is dropped when there are many; arrays that view it keep it alive."""
        content = self._maps.get(shard)
        if content is None:
            with open(self.path / self.shards[shard].name, "rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if len(self._maps) >= MAX_OPEN_SHARDS:
                del self._maps[next(iter(self._maps))]
            self._maps[shard] = content
        return content

    def _open_manifest(self) -> dict:
        if not (self.path / MANIFEST).is_file():
            what = "is no prepared corpus" if self.path.exists() else "does not exist"
            output = shlex.quote(str(self.path))
            raise DataError(
                f"corpus {self.path} {what}; make one with `python -m data.prepare input=YOUR_TEXT output={output}`, "
                f"or, without text at hand, `python -m data.prepare input=stdlib output={output} tokenizer=train:4096`"
            )
        return read_manifest(self.path)

    def _check_files(self) -> None:
        if not self.tokens:
            raise DataError(f"split {self.split!r} of corpus {self.path} is empty; {self._repair()}")
        for shard in self.shards:
            path = self.path / shard.name
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                found = "is missing" if size is None else f"has {size:,} bytes"
                raise DataError(f"shard {path} {found}, the manifest says {shard.bytes:,} bytes; {self._repair()}")
        if self.tokenizer_file.is_file():
            if xxhash.xxh3_128_hexdigest(self.tokenizer_file.read_bytes()) != self.tokenizer_hash:
                raise DataError(f"{self.tokenizer_file} is not the tokenizer of these shards; {self._repair()}")

    def _open_index(self, shard: Shard) -> np.ndarray:
        path = index_path(self.path / shard.name)
        index = read_index(path)
        figures = len(index), int(index["tokens"].sum()), int(index["documents"].sum())
        ends = index["doclen_at"] + index["documents"] * DOCLEN_DTYPE.itemsize
        named = shard.chunks, shard.tokens, shard.documents
        if figures != named or (index["tokens_at"] > index["doclen_at"]).any() or (ends > shard.bytes).any():
            raise DataError(
                f"{path} counts {figures} chunks, tokens and documents, the manifest {named}, "
                f"or it points outside the shard; rebuild it with `python -m data.index {shlex.quote(str(self.path))}`"
            )
        return index

    def _repair(self) -> str:
        """What to do about damage, with the command that made this corpus."""
        words = {key: value for key, value in self._manifest["arguments"].items() if value is not None}
        words = {"input": words.pop("input", "YOUR_TEXT"), "output": str(self.path)} | words
        command = " ".join(f"{key}={shlex.quote(str(value))}" for key, value in words.items())
        return f"copy it again from where it is whole, or delete the folder and run `python -m data.prepare {command}`"
