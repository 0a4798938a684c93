"""The storage format: WebDataset tar shards, an index beside each, one manifest for all.

    OUTPUT/manifest.json            what is here: tokenizer, vocabulary, splits, size and hash of every shard
    OUTPUT/tokenizer.json
    OUTPUT/train-000000.tar         USTAR; two members are one chunk, about a million tokens in whole documents:
        train-000000-000000.tokens.npy    [tokens] uint16 (vocabulary < 65,536) or uint32
        train-000000-000000.doclen.npy    [documents] uint32, tokens of each document, its end token included
    OUTPUT/train-000000.idx         npy with one record per chunk: where it lies, its size, its checksum

Stock webdataset reads the shards; an index follows from its shard alone. Equal input gives equal bytes.
"""

import io
import json
import os
import tarfile
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import xxhash

from data.errors import DataError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
DOCLEN_DTYPE = np.dtype("<u4")
INDEX_DTYPE = np.dtype(
    [
        ("tokens_at", "<u8"),  # byte offset of the first token in the shard
        ("doclen_at", "<u8"),  # byte offset of the first document length
        ("tokens", "<u8"),
        ("documents", "<u8"),
        ("checksum", "<u8"),  # xxh3-64 of the tokens' bytes followed by the document lengths' bytes
    ]
)
BLOCK = tarfile.BLOCKSIZE  # 512 bytes: headers and payloads start on multiples of it
END_OF_ARCHIVE = bytes(2 * BLOCK)


@dataclass(frozen=True)
class Shard:
    """What the manifest says of one shard."""

    name: str
    bytes: int
    tokens: int
    documents: int
    chunks: int
    hash: str  # xxh3-128 of the whole file


def token_dtype(vocabulary: int) -> np.dtype:
    return np.dtype("<u2" if vocabulary < 1 << 16 else "<u4")


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".idx")


def chunk_key(shard_name: str, chunk: int) -> str:
    return f"{shard_name.removesuffix('.tar')}-{chunk:06d}"


def checksum(tokens: memoryview | bytes, doclen: memoryview | bytes) -> int:
    digest = xxhash.xxh3_64(tokens)
    digest.update(doclen)
    return digest.intdigest()


class SplitWriter:
    """Writes the documents of one split, in the order they come, as shards `SPLIT-000000.tar`, `SPLIT-000001.tar`, …"""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, chunk_tokens: int, shard_tokens: int):
        self.shards: list[Shard] = []
        self._folder, self._split, self._dtype = folder, split, dtype
        self._chunk_tokens, self._shard_tokens = chunk_tokens, shard_tokens
        self._documents: list[np.ndarray] = []  # of the chunk under way
        self._pending = 0  # their tokens
        self._tar: _TarWriter | None = None

    def add(self, document: np.ndarray) -> None:
        """One document's tokens. A chunk ends with the document that fills it."""
        self._documents.append(document)
        self._pending += len(document)
        if self._pending >= self._chunk_tokens:
            self._write_chunk()

    def close(self) -> None:
        if self._documents:
            self._write_chunk()
        if self._tar:
            self.shards.append(self._tar.close())
            self._tar = None

    def _write_chunk(self) -> None:
        tokens = np.concatenate(self._documents, dtype=self._dtype)
        doclen = np.array([len(document) for document in self._documents], dtype=DOCLEN_DTYPE)
        self._documents, self._pending = [], 0
        if self._tar is None:
            self._tar = _TarWriter(self._folder / f"{self._split}-{len(self.shards):06d}.tar")
        self._tar.add_chunk(tokens, doclen)
        if self._tar.tokens >= self._shard_tokens:
            self.shards.append(self._tar.close())
            self._tar = None


class _TarWriter:
    """One shard, its hash and its index, written front to back. tarfile only makes the headers."""

    def __init__(self, path: Path):
        self.tokens = 0
        self._path = path
        self._file = open(path, "wb")
        self._hash = xxhash.xxh3_128()
        self._index: list[tuple[int, ...]] = []

    def add_chunk(self, tokens: np.ndarray, doclen: np.ndarray) -> None:
        key = chunk_key(self._path.name, len(self._index))
        tokens_at = self._add_array(f"{key}.tokens.npy", tokens)
        doclen_at = self._add_array(f"{key}.doclen.npy", doclen)
        self._index.append((tokens_at, doclen_at, len(tokens), len(doclen), checksum(tokens.data, doclen.data)))
        self.tokens += len(tokens)

    def close(self) -> Shard:
        self._write(END_OF_ARCHIVE)
        size = self._file.tell()
        flush_to_disk(self._file)
        self._file.close()
        index = np.array(self._index, dtype=INDEX_DTYPE)
        write_index(index_path(self._path), index)
        return Shard(
            name=self._path.name,
            bytes=size,
            tokens=int(index["tokens"].sum()),
            documents=int(index["documents"].sum()),
            chunks=len(index),
            hash=self._hash.hexdigest(),
        )

    def _add_array(self, name: str, array: np.ndarray) -> int:
        """Appends a member; returns the byte offset of its first element."""
        payload = io.BytesIO()
        np.save(payload, array)
        member = tarfile.TarInfo(name)  # mtime 0, owner 0, mode 0644: nothing of this machine or moment
        member.size = payload.tell()
        self._write(member.tobuf(tarfile.USTAR_FORMAT))
        self._write(payload.getbuffer())
        first_element = self._file.tell() - array.nbytes
        self._write(bytes(-member.size % BLOCK))
        return first_element

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)


def scan_shard(path: Path) -> tuple[np.ndarray, str]:
    """The index of a shard from its bytes alone, [chunks] INDEX_DTYPE, and the shard's hash."""
    records = []
    try:
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
    except tarfile.TarError as error:
        raise DataError(f"{path} is no whole tar file ({error}); copy it again from where it is whole") from None
    content = np.memmap(path, dtype=np.uint8, mode="r")
    end = members[-1].offset_data + members[-1].size if members else 0
    if bytes(content[end + -end % BLOCK :][: len(END_OF_ARCHIVE)]) != END_OF_ARCHIVE:
        raise DataError(f"{path} is cut off after {len(members)} members; copy it again from where it is whole")
    for chunk, pair in enumerate(zip_longest(members[::2], members[1::2])):
        key = chunk_key(path.name, chunk)
        if [member and member.name for member in pair] != [f"{key}.tokens.npy", f"{key}.doclen.npy"]:
            raise DataError(f"{path} holds {pair[0].name} where {key}.tokens.npy, .doclen.npy belong; prepare it again")
        (tokens_at, tokens), (doclen_at, doclen) = (_npy_payload(content, member) for member in pair)
        records.append((tokens_at, doclen_at, len(tokens), len(doclen), checksum(tokens.data, doclen.data)))
    return np.array(records, dtype=INDEX_DTYPE), xxhash.xxh3_128_hexdigest(content.data)


def _npy_payload(content: np.ndarray, member: tarfile.TarInfo) -> tuple[int, np.ndarray]:
    """Byte offset and elements of an npy member."""
    raw = content[member.offset_data : member.offset_data + member.size]
    header = io.BytesIO(raw[:4096].tobytes())
    np.lib.format.read_magic(header)
    (length,), _, dtype = np.lib.format.read_array_header_1_0(header)
    return member.offset_data + header.tell(), raw[header.tell() :].view(dtype)[:length]


def write_index(path: Path, index: np.ndarray) -> None:
    """Beside first, then in place: a reader sees the old index or the new one."""
    beside = path.with_suffix(".idx.new")
    with open(beside, "wb") as file:
        np.save(file, index)
        flush_to_disk(file)
    os.replace(beside, path)


def read_index(path: Path) -> np.ndarray:
    """[chunks] INDEX_DTYPE."""
    repair = f"rebuild it with `python -m data.index {path.parent}`"
    try:
        index = np.load(path)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {repair}") from None
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path} is damaged ({error}); {repair}") from None
    if index.dtype != INDEX_DTYPE or index.ndim != 1:
        raise DataError(f"{path} holds {index.dtype} where an index of chunks belongs; {repair}")
    return index


def write_manifest(folder: Path, manifest: dict, splits: dict[str, list[Shard]]) -> dict:
    """Completes the manifest by the shards' figures and writes it."""
    manifest = manifest | {"splits": {}}
    for split, shards in splits.items():
        totals = {
            figure: sum(getattr(shard, figure) for shard in shards) for figure in ("tokens", "documents", "chunks")
        }
        manifest["splits"][split] = totals | {"shards": [asdict(shard) for shard in shards]}
    with open(folder / MANIFEST, "w") as file:
        json.dump(manifest, file, indent=1, ensure_ascii=False)
        file.write("\n")
        flush_to_disk(file)
    return manifest


def read_manifest(folder: Path) -> dict:
    """The manifest of a corpus that exists and has this version's format."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        version = manifest["format_version"]
        missing = {"vocabulary", "dtype", "eos", "tokenizer", "arguments", "splits"} - manifest.keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); copy it again, or prepare {folder} again") from None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format {version}, this code reads {FORMAT_VERSION}; delete {folder}, prepare it again"
        )
    if missing:
        raise DataError(
            f"{path} is damaged (no {', '.join(sorted(missing))}); copy it again, or prepare {folder} again"
        )
    return manifest


def flush_to_disk(file: io.IOBase) -> None:
    file.flush()
    os.fsync(file.fileno())
