"""Text in, documents out: text files, JSONL (plain, gzip, zstd) and Parquet, in one order that everybody reproduces.

A text file is one document; a JSONL line or a Parquet row is one document under `text_key`. Nothing is cleaned,
filtered or normalised here: line endings, blanks and odd characters reach the tokenizer as they are.
"""

import io
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
import xxhash

from data.errors import DataError

STDLIB = "stdlib"  # the word for the running interpreter's own sources: text that is there without a download
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
PARQUET = (".parquet",)
PARQUET_ROWS = 1024  # per read


class InputFile(NamedTuple):
    path: Path
    name: str  # the path below the input it was found in, with forward slashes: the same on every machine
    bytes: int
    skip_bad: bool

    @property
    def kind(self) -> str:
        """What a document of it is: a "line", a "row" or the whole "file"."""
        name = self.name.lower()
        return "line" if name.endswith(JSONL) else "row" if name.endswith(PARQUET) else "file"


class Document(NamedTuple):
    text: str
    hash: int  # xxh3-64 of the text's UTF-8 bytes
    bytes: int  # of the text in UTF-8
    position: int  # bytes of its file consumed so far, for the progress bar


class BadText(Exception):
    """One document that is no text; an error or a skipped document, as the user chose."""


@dataclass
class Skipped:
    """Documents that were left out, counted while reading."""

    bad: int = 0
    empty: int = 0


def find_files(inputs: list[str], skip_bad: bool) -> list[InputFile]:
    """Every file below the inputs, in the order given and sorted by name within each. Hidden files are left out."""
    found = []
    for entry in inputs:
        if entry == STDLIB:
            found += _stdlib_files()
        elif os.path.isdir(entry):
            found += _walk(entry, skip_bad)
        elif os.path.isfile(entry):
            found.append(InputFile(Path(entry), os.path.basename(entry), os.path.getsize(entry), skip_bad))
        else:
            raise DataError(f"input {entry!r} does not exist; give a text file, a folder, .jsonl, .parquet or {STDLIB}")
    if not found:
        raise DataError(f"input {','.join(inputs)!r} holds no files; give a folder with text files, .jsonl or .parquet")
    return found


def shuffled_files(files: list[InputFile], seed: int) -> list[InputFile]:
    """The order in which files are visited when only part of the input is wanted."""
    return sorted(
        files, key=lambda file: (xxhash.xxh3_64_intdigest(file.name.encode(errors="surrogateescape"), seed), file.name)
    )


def read_documents(
    files: list[InputFile], text_key: str, skipped: Skipped, limit_bytes: int | None = None
) -> Iterator[tuple[InputFile, Document]]:
    """The non-empty documents of `files` in order, at most `limit_bytes` of text in all."""
    used = 0
    for file in files:
        if limit_bytes is not None and file.kind == "file" and used + file.bytes > limit_bytes:
            continue
        for document in read_file(file, text_key, skipped):
            used += document.bytes
            if limit_bytes is not None and used > limit_bytes:
                return
            yield file, document


def sample_text(files: list[InputFile], text_key: str, seed: int, budget: int) -> list[str]:
    """About `budget` characters of text from many files, at most 1/64 of it from any one while there are more."""
    share = budget // min(len(files), 64)
    sample: list[str] = []
    used = 0
    for file in shuffled_files(files, seed):
        left = min(share, budget - used)
        for document in read_file(file, text_key, Skipped()):
            sample.append(document.text[:left])
            used += len(sample[-1])
            left -= len(sample[-1])
            if left <= 0:
                break
        if used >= budget:
            break
    return sample


def read_file(file: InputFile, text_key: str, skipped: Skipped) -> Iterator[Document]:
    """The non-empty documents of one file. What is no text raises DataError, or is counted if the file says so."""
    if file.kind == "row":
        raw_documents = _parquet_rows(file, text_key)
    elif file.kind == "line":
        raw_documents = _json_lines(file)
    else:
        raw_documents = [(file.path.read_bytes(), 1, file.bytes)]
    for raw, number, position in raw_documents:
        try:
            text, encoded = _text_of(raw, number, file, text_key)
        except BadText as error:
            if not file.skip_bad:
                raise DataError(f"{error}; repair it, leave it out of the input, or use bad_text=skip") from None
            skipped.bad += 1
            continue
        if not text:
            skipped.empty += 1
            continue
        yield Document(text, xxhash.xxh3_64_intdigest(encoded), len(encoded), position)


def _text_of(raw: bytes | None, number: int, file: InputFile, text_key: str) -> tuple[str, bytes]:
    """The text of one raw document and the same in UTF-8. `number` is the line or row, from 1."""
    where = f"{file.path}" if file.kind == "file" else f"{file.kind} {number} of {file.path}"
    if raw is None:
        raise BadText(f"{where} has a null in {text_key!r}")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise BadText(f"{where} is not UTF-8 at its byte {error.start} (0x{raw[error.start]:02x})") from None
    if file.kind != "line":
        return text, raw
    try:
        record = json.loads(text)
    except ValueError as error:
        raise BadText(f"{where} is not JSON ({error})") from None
    if not isinstance(record, dict) or text_key not in record:
        keys = ", ".join(map(repr, record)) if isinstance(record, dict) else f"no keys but a {type(record).__name__}"
        raise DataError(f"{where} has no key {text_key!r}, it has {keys}; name the right one by text_key=")
    text = record[text_key]
    if not isinstance(text, str):
        raise BadText(f"{where} has a {type(text).__name__} in {text_key!r} where text should be")
    try:
        return text, text.encode()
    except UnicodeEncodeError as error:
        raise BadText(f"{where} is not Unicode: half of a surrogate pair at character {error.start}") from None


def _json_lines(file: InputFile) -> Iterator[tuple[bytes, int, int]]:
    """(line, number from 1, bytes of the file consumed)."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(file.path.suffix.lower())
    with open(file.path, "rb") as raw:
        stream = io.BufferedReader(pyarrow.CompressedInputStream(raw, compression)) if compression else raw
        try:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield line, number, raw.tell()
        except OSError as error:
            if not compression:
                raise
            raise DataError(
                f"{file.path} is no whole {compression} file ({error}); copy or download it again"
            ) from None


def _parquet_rows(file: InputFile, text_key: str) -> Iterator[tuple[bytes | None, int, int]]:
    """(text as bytes, row from 1, bytes of the file consumed)."""
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            if text_key not in table.schema_arrow.names:
                names = ", ".join(map(repr, table.schema_arrow.names))
                raise DataError(
                    f"{file.path} has no column {text_key!r}, it has {names}; name the one with the text by text_key="
                )
            column_type = table.schema_arrow.field(text_key).type
            if str(column_type).removeprefix("large_") not in ("string", "binary", "string_view"):
                raise DataError(
                    f"{file.path}: column {text_key!r} holds {column_type}, not text; set another text_key="
                )
            number, rows = 0, max(1, table.metadata.num_rows)
            for batch in table.iter_batches(PARQUET_ROWS, columns=[text_key]):
                for raw in batch.column(0).cast(pyarrow.large_binary()):  # bytes: Arrow would not say where UTF-8 ends
                    number += 1
                    yield raw.as_py(), number, file.bytes * number // rows
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{file.path} is no whole Parquet file ({error}); copy or download it again") from None


def _walk(folder: str, skip_bad: bool, leave_out: frozenset[str] = frozenset()) -> list[InputFile]:
    """Files below `folder`, sorted by their path with forward slashes, without hidden ones and `leave_out` folders."""
    found = []
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in leave_out]
        for name in names:
            path = os.path.join(here, name)
            if not name.startswith(".") and os.path.isfile(path):
                below = os.path.relpath(path, folder).replace(os.sep, "/")
                found.append(InputFile(Path(path), below, os.path.getsize(path), skip_bad))
    return sorted(found, key=lambda file: file.name)


def _stdlib_files() -> list[InputFile]:
    """The standard library's *.py. Some of its tests are deliberately not UTF-8: bad files are always skipped."""
    installed = frozenset({"site-packages", "dist-packages", "__pycache__"})
    files = _walk(sysconfig.get_path("stdlib"), skip_bad=True, leave_out=installed)
    return [file for file in files if file.name.endswith(".py")]
