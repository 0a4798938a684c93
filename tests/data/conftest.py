"""A small corpus of text files whose tokens are bytes: what is in the shards can be read without the tokenizer."""

import random

import pytest

from data.prepare import Preparation, prepare

END = 256  # the bytes tokenizer's end of text


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Different texts of 2 to 400 characters, some of them several bytes long."""
    generator = random.Random(7)
    alphabet = "abc xyz\n\r\täß你😀"
    return ["".join(generator.choices(alphabet, k=generator.randint(1, 398))) + str(i) for i in range(40)]


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("texts")
    for i, text in enumerate(texts):
        (folder / f"{i:03d}.txt").write_bytes(text.encode())
    return folder


@pytest.fixture
def make_corpus(tmp_path, text_folder):
    """make_corpus(name, ...) prepares the texts, in many small chunks and a few shards, and returns the folder."""

    def make(name: str = "corpus", **arguments):
        defaults = dict(
            input=str(text_folder), tokenizer="bytes", validation=0.2, chunk_tokens=600, shard_tokens=3000, workers=2
        )
        prepare(Preparation(output=str(tmp_path / name), **defaults | arguments))
        return tmp_path / name

    return make


@pytest.fixture
def corpus_folder(make_corpus):
    return make_corpus()


@pytest.fixture(scope="session")
def stored_documents():
    """stored_documents(stream) are the texts in a stream of bytes tokens, by the plainest reading there is."""

    def read(stream: list[int]) -> list[str]:
        found, bytes_so_far = [], []
        for token in stream:
            if token == END:
                found.append(bytes(bytes_so_far).decode())
                bytes_so_far = []
            else:
                bytes_so_far.append(token)
        assert not bytes_so_far, "the stream does not end with the end of a document"
        return found

    return read
