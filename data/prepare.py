"""`python -m data.prepare`: text → shuffled, tokenized WebDataset shards with train and validation splits.

Two passes: encode every document into a scratch folder, then write the shards in shuffled order. The output appears by
one rename when all of it is on disk; the same arguments on the same input give the same bytes.
"""

import dataclasses
import difflib
import glob
import os
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from tqdm import tqdm

from data.documents import Document, InputFile, Skipped, find_files, read_documents, sample_text, shuffled_files
from data.errors import DataError
from data.shards import (
    FORMAT_VERSION,
    MANIFEST,
    TOKENIZER,
    Shard,
    SplitWriter,
    flush_to_disk,
    read_manifest,
    token_dtype,
    write_manifest,
)
from data.shuffle import Shuffle
from data.tokenizer import Tokenizer, make_tokenizer, read_definition

HELP = """\
Turns text into shuffled, tokenized WebDataset shards for pretraining.

    python -m data.prepare input=PATH[,PATH..] output=DIR [key=value ..]

  input            text files, folders (searched recursively), .jsonl[.gz|.zst], .parquet, separated by commas;
                   the word stdlib stands for Python's own standard library: 30 MB of text without a download
  output           folder to create

  tokenizer        train:N learns a byte-level BPE of N tokens from the input; bytes takes the 256 bytes; or the path of
                   a Hugging Face tokenizer.json                                                    [train:8192]
  eos              token that ends a document                           [the tokenizer's <|endoftext|>, </s>, ..]
  text_key         key (JSONL) or column (Parquet) that holds the text                              [text]
  bad_text         error or skip: what to do with a document that is not UTF-8 text                 [error]
  validation       share of the documents to hold out; equal documents stay on one side; 0 for none [0.01]
  limit_bytes      take only this much of the text, a random choice of files                        [all]
  seed             of the order of the documents                                                    [0]
  chunk_tokens     tokens per chunk, about                                                          [1048576]
  shard_tokens     tokens per shard, about                                                          [536870912]
  workers          encoder threads                                                                  [all cores]

A try without any data of your own:

    python -m data.prepare input=stdlib output=corpus/stdlib tokenizer=train:4096
"""
BATCH_BYTES = 4 << 20  # text handed to the encoder at a time


def _available_cores() -> int:
    """Those of this process: a Slurm step has fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(kw_only=True, frozen=True)
class Preparation:
    """The arguments of one run; HELP says what they mean."""

    input: str
    output: str
    tokenizer: str = "train:8192"
    eos: str | None = None
    text_key: str = "text"
    bad_text: str = "error"
    validation: float = 0.01
    limit_bytes: int | None = None
    seed: int = 0
    chunk_tokens: int = 1 << 20
    shard_tokens: int = 1 << 29
    workers: int = dataclasses.field(default_factory=_available_cores)

    def __post_init__(self):
        if not 0 <= self.validation < 1:
            raise DataError(f"validation={self.validation} is no share of the documents; use 0.01 for one in a hundred")
        if self.bad_text not in ("error", "skip"):
            raise DataError(f"bad_text={self.bad_text} is unknown; use error or skip")
        if self.shard_tokens < self.chunk_tokens:
            raise DataError(f"shard_tokens={self.shard_tokens} is below chunk_tokens={self.chunk_tokens}; raise it")
        for name in ("chunk_tokens", "limit_bytes", "workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise DataError(f"{name}={value} must be at least 1")
        if not 0 <= self.seed < 1 << 64:
            raise DataError(f"seed={self.seed} must lie between 0 and 2**64 - 1")

    @property
    def inputs(self) -> list[str]:
        return [entry for entry in self.input.split(",") if entry]

    def what_decides_the_result(self) -> dict:
        """The arguments that the manifest keeps and a second run is compared by."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in ("output", "workers")}


def prepare(arguments: Preparation) -> dict:
    """Writes the corpus unless it is there already; returns its manifest."""
    output = Path(arguments.output)
    if finished := _finished(arguments):
        print(f"already prepared: {output}")
        return finished
    for entry in arguments.inputs:
        if Path(entry).resolve() in output.resolve().parents:
            raise DataError(f"output={output} lies inside input={entry} and would be read as text; choose one outside")
    files = find_files(arguments.inputs, arguments.bad_text == "skip")
    output.parent.mkdir(parents=True, exist_ok=True)
    for left_over in output.parent.glob(f".{glob.escape(output.name)}.unfinished-*"):
        print(f"another run is at work or was killed; if it was killed: rm -r {shlex.quote(str(left_over))}")
    unfinished = output.parent / f".{output.name}.unfinished-{secrets.token_hex(4)}"
    unfinished.mkdir()
    try:
        manifest = _write_corpus(arguments, files, unfinished)
        try:
            unfinished.rename(output)
        except OSError:
            if not (finished := _finished(arguments)):
                raise
            print(f"already prepared by another process meanwhile: {output}")
            return finished
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return manifest


def _finished(arguments: Preparation) -> dict | None:
    """The manifest of the output if these arguments made it, None without output; anything else is an error."""
    output = Path(arguments.output)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / MANIFEST).is_file():
        raise DataError(f"output={output} exists and is no prepared corpus; choose another output")
    manifest = read_manifest(output)
    choose = f"choose another output, or `rm -r {shlex.quote(str(output))}` first"
    before, now = manifest["arguments"], arguments.what_decides_the_result()
    if changed := [name for name in now if before.get(name) != now[name]]:
        was, asked = (" ".join(f"{name}={values.get(name)}" for name in changed) for values in (before, now))
        raise DataError(f"output={output} was prepared with {was}, now asked for {asked}; {choose}")
    if os.path.exists(arguments.tokenizer):
        digest = xxhash.xxh3_128_hexdigest(read_definition(arguments.tokenizer).encode())
        if digest != manifest["tokenizer"]["hash"]:
            raise DataError(f"tokenizer={arguments.tokenizer} is not the one output={output} was made with; {choose}")
    try:
        files = find_files(arguments.inputs, skip_bad=True)
    except DataError:  # the text may be gone once the shards are there
        return manifest
    before, now = manifest["input"], _figures(files)
    if changed := [name for name in now if before[name] != now[name]]:
        was, found = (" and ".join(f"{values[name]:,} {name}" for name in changed) for values in (before, now))
        raise DataError(f"output={output} was made from {was} of input, now there are {found}; {choose}")
    return manifest


def _figures(files: list[InputFile]) -> dict[str, int]:
    return {"files": len(files), "bytes": sum(file.bytes for file in files)}


def _write_corpus(arguments: Preparation, files: list[InputFile], folder: Path) -> dict:
    """Both passes, into `folder`."""
    started = time.monotonic()

    def sample(characters: int) -> list[str]:
        wanted = min(characters, arguments.limit_bytes or characters)
        return sample_text(files, arguments.text_key, arguments.seed, wanted)

    tokenizer = make_tokenizer(arguments.tokenizer, arguments.eos, arguments.workers, sample)
    print(f"tokenizer {arguments.tokenizer}: {tokenizer.vocabulary:,} tokens, {time.monotonic() - started:.0f} s")
    with open(folder / TOKENIZER, "wb") as file:
        file.write(tokenizer.definition.encode())
        flush_to_disk(file)

    dtype = token_dtype(tokenizer.vocabulary)
    shuffle = Shuffle(folder, _figures(files)["bytes"], dtype, arguments.seed)
    skipped, text_hash, hashes = Skipped(), xxhash.xxh3_128(), _Extremes()
    try:
        for document, tokens in _encoded(arguments, files, tokenizer, skipped):
            text_hash.update(document.hash.to_bytes(8, "little"))
            hashes.add(document.hash)
            shuffle.add(tokens, document.hash)
    finally:
        shuffle.close()
    if not shuffle.documents:
        left_out = f"{skipped.empty:,} empty and {skipped.bad:,} unreadable documents were left out"
        limit = f", limit_bytes={arguments.limit_bytes:,}" if arguments.limit_bytes else ""
        raise DataError(
            f"input={arguments.input} holds no text ({len(files):,} files; {left_out}{limit}); give other input"
        )

    splits = _write_splits(arguments, shuffle, hashes.threshold(arguments.validation), dtype, folder)
    manifest = {
        "format_version": FORMAT_VERSION,
        "vocabulary": tokenizer.vocabulary,
        "dtype": dtype.name,
        "eos": tokenizer.eos,
        "tokenizer": {"file": TOKENIZER, "hash": tokenizer.hash},
        "input": _figures(files) | {"hash": text_hash.hexdigest()} | dataclasses.asdict(skipped),
        "arguments": arguments.what_decides_the_result(),
    }
    return write_manifest(folder, manifest, splits)


def _encoded(arguments: Preparation, files: list[InputFile], tokenizer: Tokenizer, skipped: Skipped) -> Iterator[tuple]:
    """(document, its tokens) in input order, with a progress bar in bytes of the files."""
    if arguments.limit_bytes is not None:
        files = shuffled_files(files, arguments.seed)
    total = min(_figures(files)["bytes"], arguments.limit_bytes or sys.maxsize)
    batch: list[Document] = []
    pending = 0  # bytes of text in it
    with tqdm(total=total, desc="encode", unit="B", unit_scale=True, dynamic_ncols=True, disable=None) as bar:
        current, before = None, 0
        for file, document in read_documents(files, arguments.text_key, skipped, arguments.limit_bytes):
            if file is not current:
                current, before = file, 0
            bar.update(document.position - before)
            before = document.position
            batch.append(document)
            pending += document.bytes
            if pending >= BATCH_BYTES:
                yield from zip(batch, tokenizer.encode([document.text for document in batch]), strict=True)
                batch, pending = [], 0
        yield from zip(batch, tokenizer.encode([document.text for document in batch]), strict=True)


class _Extremes:
    """Chooses the split from the documents' hashes, of which it keeps only the smallest and the largest."""

    def __init__(self):
        self.documents, self.smallest, self.largest = 0, 1 << 64, -1

    def add(self, document_hash: int) -> None:
        self.documents += 1
        self.smallest = min(self.smallest, document_hash)
        self.largest = max(self.largest, document_hash)

    def threshold(self, validation: float) -> int:
        """Documents with a hash below it are validation. So a text is on one side whatever else is in the corpus."""
        if not validation or self.documents == 1:
            return 0
        if self.smallest == self.largest:
            raise DataError("all documents are one and the same text, so none can be held out; use validation=0")
        return min(max(int(validation * (1 << 64)), self.smallest + 1), self.largest)


def _write_splits(
    arguments: Preparation, shuffle: Shuffle, threshold: int, dtype: np.dtype, folder: Path
) -> dict[str, list[Shard]]:
    """The shards of both splits, by split."""
    writers = {
        split: SplitWriter(folder, split, dtype, arguments.chunk_tokens, arguments.shard_tokens)
        for split in ("train", "validation")
    }
    total = shuffle.documents
    for tokens, document_hash in tqdm(shuffle, "write", total, unit=" documents", dynamic_ncols=True, disable=None):
        writers["validation" if document_hash < threshold else "train"].add(tokens)
    for writer in writers.values():
        writer.close()
    return {split: writer.shards for split, writer in writers.items() if writer.shards}


def parse(arguments: list[str]) -> Preparation:
    """key=value words, with types as in Preparation."""
    fields = {field.name: field for field in dataclasses.fields(Preparation)}
    values = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {near[0]}=?" if near else f"there are {', '.join(f'{key}=' for key in fields)}"
            raise DataError(f"unknown argument {argument!r}; {hint}")
        kind = {int: int, int | None: int, float: float}.get(fields[name].type, str)
        try:
            values[name] = kind(value)
        except ValueError:
            raise DataError(f"{argument} should be {'a whole number' if kind is int else 'a number'}") from None
    for name in ("input", "output"):
        if not values.get(name):
            raise DataError(f"{name}= is missing; as in `python -m data.prepare input=stdlib output=corpus/stdlib`")
    return Preparation(**values)


def _report(arguments: Preparation, manifest: dict, seconds: float) -> None:
    left_out = manifest["input"]
    print(f"corpus      {arguments.output}  ({seconds:.0f} s)")
    print(f"vocabulary  {manifest['vocabulary']:,} tokens, stored as {manifest['dtype']}")
    for split, figures in manifest["splits"].items():
        shards = f"{len(figures['shards']):,} shard" + "s" * (len(figures["shards"]) > 1)
        print(f"{split:<11} {figures['tokens']:,} tokens, {figures['documents']:,} documents, {shards}")
    if left_out["bad"] or left_out["empty"]:
        print(f"left out    {left_out['empty']:,} empty and {left_out['bad']:,} unreadable documents")


def main(words: list[str]) -> int:
    if not words or {"-h", "--help", "help"} & set(words):
        print(HELP, end="")
        return 0
    started = time.monotonic()
    try:
        arguments = parse(words)
        os.environ.setdefault("RAYON_NUM_THREADS", str(arguments.workers))  # the threads of Hugging Face tokenizers
        _report(arguments, prepare(arguments), time.monotonic() - started)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
