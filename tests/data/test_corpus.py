"""Reading the stream back, and every kind of damage found."""

import json
import shutil

import numpy as np
import pytest

from data import Corpus, DataError
from data.index import main as index_main
from data.index import rebuild
from data.shards import INDEX_DTYPE


def first_shard(folder):
    return sorted(folder.glob("train-*.tar"))[0]


def test_reading_anywhere_equals_slicing_the_whole_stream(corpus_folder):
    corpus = Corpus(corpus_folder, "train")
    whole = corpus.read(0, corpus.tokens)
    assert len(corpus.shards) > 1
    generator = np.random.default_rng(0)
    for start in generator.integers(0, corpus.tokens, 300):
        length = int(generator.integers(0, min(2000, corpus.tokens - start) + 1))
        tokens, ends = corpus.read(int(start), length)
        assert np.array_equal(tokens, whole.tokens[start : start + length])
        inside = (whole.document_ends > start) & (whole.document_ends <= start + length)
        assert np.array_equal(ends, whole.document_ends[inside] - start)
    assert np.array_equal(whole.document_ends - 1, np.flatnonzero(whole.tokens == corpus.eos))
    with pytest.raises(IndexError):
        corpus.read(corpus.tokens - 1, 2)


def test_a_span_in_one_chunk_is_a_view_that_cannot_be_written(make_corpus):
    corpus = Corpus(make_corpus(chunk_tokens=10**6, shard_tokens=10**6), "train")
    tokens = corpus.read(5, 10).tokens
    assert not tokens.flags.owndata and not tokens.flags.writeable


def test_many_shards_need_few_open_files(make_corpus, monkeypatch):
    monkeypatch.setattr("data.corpus.MAX_OPEN_SHARDS", 1)
    corpus = Corpus(make_corpus(shard_tokens=600), "train")
    held = [corpus.read(start, 300).tokens for start in range(0, corpus.tokens - 300, 300)]
    assert len(corpus._maps) == 1 < len(corpus.shards)
    assert np.array_equal(np.concatenate(held), corpus.read(0, 300 * len(held)).tokens)  # views outlive their mapping


def test_an_index_rebuilt_from_the_tars_is_the_one_written(corpus_folder):
    written = {path.name: path.read_bytes() for path in corpus_folder.glob("*.idx")}
    for path in corpus_folder.glob("*.idx"):
        path.unlink()
    with pytest.raises(DataError, match=r"\.idx is missing; rebuild it with `python -m data.index"):
        Corpus(corpus_folder, "train")
    assert index_main([str(corpus_folder)]) == 0
    assert {path.name: path.read_bytes() for path in corpus_folder.glob("*.idx")} == written
    assert sum(len(np.load(path)) for path in corpus_folder.glob("train-*.idx")) == sum(
        shard.chunks for shard in Corpus(corpus_folder, "train").shards
    )


def test_a_flipped_bit_is_found_where_it_is(corpus_folder):
    shard = sorted(corpus_folder.glob("train-*.tar"))[1]
    index = np.load(shard.with_suffix(".idx"))
    place = int(index["tokens_at"][2]) + 7
    content = bytearray(shard.read_bytes())
    content[place] ^= 1
    shard.write_bytes(content)
    corpus = Corpus(corpus_folder, "train")
    corpus.read(0, 100)  # elsewhere all is well
    with pytest.raises(
        DataError, match="chunk train-000001-000002 of .*train-000001.tar is damaged .*python -m data.prepare input="
    ):
        corpus.read(0, corpus.tokens)
    with pytest.raises(DataError, match="the manifest says"):
        rebuild(corpus_folder)  # an index of the damaged shard would make it look sound


def test_a_changed_document_length_is_found(corpus_folder):
    shard = first_shard(corpus_folder)
    content = bytearray(shard.read_bytes())
    content[int(np.load(shard.with_suffix(".idx"))["doclen_at"][0])] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match="chunk train-000000-000000 "):
        Corpus(corpus_folder, "train").read(0, 10)


def test_a_truncated_or_missing_shard_is_found_at_once(corpus_folder):
    shard = first_shard(corpus_folder)
    content = shard.read_bytes()
    shard.write_bytes(content[:-1025])
    with pytest.raises(DataError, match=rf"{shard.name} has {len(content) - 1025:,} bytes, the manifest says"):
        Corpus(corpus_folder, "train")
    (corpus_folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="is cut off after|no whole tar"):
        rebuild(corpus_folder)
    shard.unlink()
    with pytest.raises(DataError, match="is no prepared corpus"):
        Corpus(corpus_folder, "train")


def test_a_missing_corpus_names_the_command_that_makes_one(tmp_path):
    where = tmp_path / "my corpus"
    command = f"python -m data.prepare input=stdlib output='{where}' tokenizer=train:4096"
    with pytest.raises(DataError, match="does not exist") as error:
        Corpus(where, "train")
    assert command in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format_version": 99}', "has format 99, this code reads 1"),
        ('{"format_version": 1}', "is damaged .no arguments, dtype"),
    ],
)
def test_a_damaged_manifest_is_named(corpus_folder, content, message):
    (corpus_folder / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=message):
        Corpus(corpus_folder, "train")


def test_a_damaged_index_is_named(corpus_folder):
    path = first_shard(corpus_folder).with_suffix(".idx")
    index = np.load(path)
    for content in (b"", path.read_bytes()[:-1], b"garbage"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"\.idx is damaged .*data\.index"):
            Corpus(corpus_folder, "train")
    wrong = index.copy()
    wrong["tokens"][0] += 1
    for array in (index[:-1], wrong, index["tokens"], np.zeros(0, INDEX_DTYPE)):
        with open(path, "wb") as file:
            np.save(file, array)
        with pytest.raises(DataError, match=r"\.idx .*data\.index"):
            Corpus(corpus_folder, "train")


def test_a_tokenizer_that_was_exchanged_is_found(corpus_folder):
    (corpus_folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is not the tokenizer of these shards"):
        Corpus(corpus_folder, "train")


def test_the_fingerprint_follows_the_content_and_not_the_place(make_corpus, tmp_path):
    folder = make_corpus()
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert Corpus(folder, "train").fingerprint == Corpus(moved, "train").fingerprint
    assert Corpus(folder, "train").fingerprint != Corpus(folder, "validation").fingerprint
    assert Corpus(folder, "train").fingerprint != Corpus(make_corpus("other", seed=1), "train").fingerprint
    fingerprints = set()
    for letter in "xy":
        (tmp_path / "in.txt").write_text(letter * 500)
        alike = make_corpus(letter, input=str(tmp_path / "in.txt"), validation=0)  # of the same sizes throughout
        fingerprints.add(Corpus(alike, "train").fingerprint)
    assert len(fingerprints) == 2
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"] = []
    manifest["splits"]["train"]["tokens"] = 0
    (moved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="split 'train' of corpus .* is empty"):
        Corpus(moved, "train")
