"""Text → shards: nothing lost, nothing added, the same bytes every time, and mistakes that explain themselves."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import webdataset

from data import Corpus, DataError
from data.documents import JSONL
from data.prepare import Preparation, main, parse, prepare
from data.shuffle import Shuffle
from data.tokenizer import Tokenizer, _fast_encoder

ROOT = Path(__file__).parents[2]


def stream(folder, split: str) -> list[int]:
    corpus = Corpus(folder, split)
    return corpus.read(0, corpus.tokens).tokens.tolist()


def shard_bytes(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_stock_webdataset_reads_what_corpus_reads(corpus_folder):
    for split in ("train", "validation"):
        shards = sorted(map(str, corpus_folder.glob(f"{split}-*.tar")))
        chunks = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
        assert len(chunks) > 2 or split == "validation"
        corpus = Corpus(corpus_folder, split)
        assert np.array_equal(np.concatenate([chunk["tokens.npy"] for chunk in chunks]), stream(corpus_folder, split))
        ends = np.cumsum(np.concatenate([chunk["doclen.npy"] for chunk in chunks]))
        assert np.array_equal(ends, corpus.read(0, corpus.tokens).document_ends)
        assert {chunk["tokens.npy"].dtype for chunk in chunks} == {np.dtype("uint16")}
        assert all(chunk["tokens.npy"][-1] == corpus.eos for chunk in chunks)  # chunks end where documents end


def test_every_text_is_stored_once_in_one_split_and_in_another_order(corpus_folder, texts, stored_documents):
    train, validation = (stored_documents(stream(corpus_folder, split)) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(texts)
    assert train and validation
    assert train != [text for text in texts if text in train]


def test_two_runs_write_the_same_bytes(make_corpus, tmp_path):
    assert shard_bytes(make_corpus("first", workers=1)) == shard_bytes(make_corpus("second"))
    train, other_seed = stream(tmp_path / "first", "train"), stream(make_corpus("third", seed=1), "train")
    assert train != other_seed and sorted(train) == sorted(other_seed)


def test_jsonl_gzip_zstd_and_parquet_give_the_tokens_of_the_text_files(make_corpus, tmp_path, texts):
    lines = "".join(json.dumps({"id": i, "body": text}) + "\n" for i, text in enumerate(texts)).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    with pyarrow.output_stream(str(tmp_path / "c.jsonl.zst"), compression="zstd") as file:
        file.write(lines)
    table = pyarrow.table({"id": range(len(texts)), "body": texts})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet", row_group_size=7)
    expected = {split: stream(make_corpus(), split) for split in ("train", "validation")}
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"):
        folder = make_corpus(name + ".corpus", input=str(tmp_path / name), text_key="body")
        assert {split: stream(folder, split) for split in expected} == expected, name
    assert all(any(name.endswith(suffix) for suffix in JSONL) for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"))


def test_a_trained_tokenizer_decodes_to_the_texts_and_is_the_same_each_time(make_corpus, texts):
    folder, again = make_corpus("once", tokenizer="train:300"), make_corpus("again", tokenizer="train:300")
    assert (folder / "tokenizer.json").read_bytes() == (again / "tokenizer.json").read_bytes()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    corpus = Corpus(folder, "train")
    assert tokenizer.get_vocab_size() == corpus.vocabulary == 300
    tokens, ends = corpus.read(0, corpus.tokens)
    found = [tokenizer.decode(document[:-1]) for document in np.split(tokens, ends[:-1])]
    assert len(found) == corpus.documents and set(found) < set(texts)
    for text, document in zip(found, np.split(tokens, ends[:-1]), strict=True):
        assert tokenizer.encode(text).ids == document[:-1].tolist()  # Hugging Face's own encoder, one text at a time


def test_a_tokenizer_file_is_taken_as_it_is_and_never_cuts_documents(make_corpus, tmp_path):
    trained = make_corpus("trained", tokenizer="train:300")
    own = tokenizers.Tokenizer.from_file(str(trained / "tokenizer.json"))
    own.enable_truncation(5)
    own.save(str(tmp_path / "own.json"))
    folder = make_corpus("own", tokenizer=str(tmp_path / "own.json"))
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "own.json").read_bytes()
    assert stream(folder, "train") == stream(trained, "train")
    assert stream(make_corpus("eos", tokenizer=str(tmp_path / "own.json"), eos="!"), "train")[-1] == own.token_to_id(
        "!"
    )


def test_a_vocabulary_of_65536_is_stored_in_four_bytes(make_corpus, tmp_path):
    characters = "abc xyz\n\r\täß你😀0123456789"
    vocabulary = {character: 70_000 + i for i, character in enumerate(characters)} | {"</s>": 1, "<unk>": 0}
    wide = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    wide.add_special_tokens(["</s>"])
    wide.save(str(tmp_path / "wide.json"))
    folder = make_corpus("wide", tokenizer=str(tmp_path / "wide.json"))
    corpus = Corpus(folder, "train")
    span = corpus.read(0, corpus.tokens)
    assert span.tokens.dtype == np.uint32 and span.tokens.max() >= 70_000
    assert corpus.vocabulary == 70_000 + len(characters) and corpus.eos == 1


def test_the_fast_encoder_agrees_with_hugging_face_on_odd_text(make_corpus, texts):
    definition = (make_corpus(tokenizer="train:400") / "tokenizer.json").read_text()
    texts = [*texts, "<|endoftext|> a<|endoftext|>", "\u00a0\u3000 \u2028 １２３ ǅ'S 'll\x00"]
    tokenizer = Tokenizer(definition, None, 2, ["any"])
    assert _fast_encoder(json.loads(definition)) is not None
    for fast, reference in zip(tokenizer._by_fast(texts), tokenizer._by_reference(texts), strict=True):
        assert fast.tolist() == reference.tolist()
        assert tokenizer.eos not in fast  # an end of text that is spelled out ends no document


def test_an_encoder_that_disagrees_on_the_sample_is_not_used(make_corpus):
    """Its ids look like bytes but two are exchanged: the shortcut for bytes would be wrong."""
    definition = json.loads((make_corpus(tokenizer="bytes") / "tokenizer.json").read_text())
    vocabulary = definition["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    tokenizer = Tokenizer(json.dumps(definition), None, 1, ["ab"])
    assert tokenizer.encode(["ab"])[0].tolist() == [98, 97, 256]


def test_the_shuffled_order_does_not_depend_on_the_number_of_buckets(tmp_path):
    orders = []
    for input_bytes in (0, 20 << 30):
        shuffle = Shuffle(tmp_path, input_bytes, np.dtype("<u2"), seed=3)
        for number in range(500):
            shuffle.add(np.full(number % 5 + 1, number, dtype=np.uint32), number)
        orders.append([(tokens.tolist(), document_hash) for tokens, document_hash in shuffle])
    assert orders[0] == orders[1]
    assert sorted(number for _, number in orders[0]) == list(range(500))
    assert all(tokens == [number] * (number % 5 + 1) for tokens, number in orders[0])


def test_validation_is_never_empty_and_holds_no_text_of_train(make_corpus, tmp_path, stored_documents):
    lines = [json.dumps({"text": text}) for text in ["one", "two", "one", "two", "one"]]
    (tmp_path / "twice.jsonl").write_text("\n".join(lines))
    for share in (1e-9, 0.5, 0.999999):
        folder = make_corpus(f"at {share}", input=str(tmp_path / "twice.jsonl"), validation=share)
        splits = [set(stored_documents(stream(folder, split))) for split in ("train", "validation")]
        assert sorted(map(len, splits)) == [1, 1] and splits[0] != splits[1]
    folder = make_corpus("none", input=str(tmp_path / "twice.jsonl"), validation=0)
    assert len(stored_documents(stream(folder, "train"))) == 5
    with pytest.raises(DataError, match="no split 'validation', it has train.*validation=0.01"):
        Corpus(folder, "validation")


def test_a_limit_takes_whole_files_up_to_it(make_corpus, texts, stored_documents):
    limit = 2000
    folder = make_corpus("limited", limit_bytes=limit)
    found = sum((stored_documents(stream(folder, split)) for split in ("train", "validation")), [])
    assert set(found) < set(texts)
    assert limit - 1700 < sum(len(text.encode()) for text in found) <= limit
    assert shard_bytes(folder) == shard_bytes(make_corpus("again", limit_bytes=limit))


def test_a_limit_ends_within_a_file_of_many_documents(make_corpus, tmp_path, stored_documents):
    (tmp_path / "in.jsonl").write_text('{"text": "0123456789"}\n' * 30)
    folder = make_corpus("limited", input=str(tmp_path / "in.jsonl"), limit_bytes=45, validation=0)
    assert stored_documents(stream(folder, "train")) == ["0123456789"] * 4


def test_members_that_fill_their_blocks_exactly_are_read_back(make_corpus, tmp_path):
    """192 tokens of 2 bytes and the 128-byte header of npy are one tar block: nothing to pad."""
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": letter * 191}) + "\n" for letter in "abc"))
    folder = make_corpus("c", input=str(tmp_path / "in.jsonl"), chunk_tokens=192, validation=0)
    chunks = webdataset.WebDataset(str(folder / "train-000000.tar"), shardshuffle=False).decode()
    assert [len(chunk["tokens.npy"]) for chunk in chunks] == [192] * 3
    assert (folder / "train-000000.tar").stat().st_size == 3 * 4 * 512 + 1024  # a header and a payload for each member


def test_a_finished_corpus_is_left_alone_and_another_request_for_it_refused(make_corpus, capsys, text_folder, tmp_path):
    folder = make_corpus()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    make_corpus(workers=1)
    assert "already prepared" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(DataError, match="seed=0, now asked for seed=5; choose another output, or `rm -r"):
        make_corpus(seed=5)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("not a corpus")
    with pytest.raises(DataError, match="is no prepared corpus; choose another output"):
        make_corpus("notes")


def test_changed_input_is_noticed(make_corpus, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.txt").write_text("one")
    (source / "b.txt").write_text("two")
    make_corpus("c", input=str(source))
    (source / "c.txt").write_text("three")
    with pytest.raises(DataError, match="made from 2 files and 6 bytes of input, now there are 3 files and 11 bytes"):
        make_corpus("c", input=str(source))


def test_an_output_inside_the_input_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match="lies inside input="):
        prepare(Preparation(input=str(tmp_path), output=str(tmp_path / "corpus"), tokenizer="bytes"))


def test_a_failed_run_leaves_nothing_behind(make_corpus, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("fine")
    (tmp_path / "in" / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"b\.txt is not UTF-8 at its byte 3 \(0xe9\).*bad_text=skip"):
        make_corpus("out", input=str(tmp_path / "in"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    manifest = prepare(
        Preparation(input=str(tmp_path / "in"), output=str(tmp_path / "out"), bad_text="skip", tokenizer="bytes")
    )
    assert manifest["input"]["bad"] == 1 and list(manifest["splits"]) == ["train"]  # one document cannot be split


def test_empty_files_are_counted_and_an_empty_corpus_refused(make_corpus, tmp_path):
    for name, text in {"a.txt": "", "b.txt": "text", "c.txt": "more"}.items():
        (tmp_path / name).write_text(text)
    folder = make_corpus("c", input=",".join(str(tmp_path / name) for name in ("a.txt", "b.txt", "c.txt")))
    assert json.loads((folder / "manifest.json").read_text())["input"]["empty"] == 1
    with pytest.raises(DataError, match="holds no text .1 files; 1 empty"):
        make_corpus("empty", input=str(tmp_path / "a.txt"))
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="holds no files"):
        make_corpus("void corpus", input=str(tmp_path / "void"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("key.jsonl", b'{"body": "x"}', "line 1 of .*key.jsonl has no key 'text', it has 'body'; .* text_key="),
        ("broken.jsonl", b'{"text": "x"}\n{"te', "line 2 of .*broken.jsonl is not JSON"),
        ("bytes.jsonl", b'{"text": "\xff"}', "line 1 of .*bytes.jsonl is not UTF-8 at its byte 10"),
        ("half.jsonl", b'{"text": "\\ud83d"}', "half of a surrogate pair at character 0"),
        ("type.jsonl", b'{"text": 3}', "has a int in 'text' where text should be"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9], "cut.jsonl.gz is no whole gzip file"),
        ("not.parquet", b"PAR1", "not.parquet is no whole Parquet file"),
    ],
)
def test_unreadable_input_names_the_place(make_corpus, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        make_corpus("c", input=str(tmp_path / name))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inptu=x"], "unknown argument 'inptu=x'; did you mean input="),
        (["input=x"], "output= is missing"),
        (["input=x", "output=y", "validation=half"], "validation=half should be a number"),
        (["input=x", "output=y", "seed=1.5"], "seed=1.5 should be a whole number"),
        (["input=x", "output=y", "validation=1"], "validation=1.0 is no share"),
        (["input=x", "output=y", "chunk_tokens=9", "shard_tokens=8"], "shard_tokens=8 is below chunk_tokens=9"),
        (["input=/nowhere", "output=y"], "input '/nowhere' does not exist"),
        (["input=in", "output=y", "tokenizer=gpt2"], "tokenizer=gpt2 is no file; use bytes, train:8192 or the path"),
        (["input=in", "output=y", "tokenizer=train:9"], "tokenizer=train:9 needs at least 257 tokens"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_exit_code_2(words, message, capsys, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error


def test_the_command_prepares_the_standard_library(tmp_path):
    command = [sys.executable, "-m", "data.prepare", "input=stdlib", "limit_bytes=300000", "tokenizer=train:512"]
    done = subprocess.run([*command, f"output={tmp_path / 'c'}"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "train" in done.stdout and "validation" in done.stdout and not done.stderr
    assert 50_000 < Corpus(tmp_path / "c", "train").tokens < 200_000


def test_the_help_names_every_argument(capsys):
    assert main(["--help"]) == 0
    help_text = capsys.readouterr().out
    assert all(f"\n  {name} " in help_text for name in Preparation.__dataclass_fields__)


def test_numbers_on_the_command_line_get_their_types():
    parsed = parse(["input=a,b", "output=c=d", "limit_bytes=1000", "validation=0"])
    assert parsed.inputs == ["a", "b"] and parsed.output == "c=d"
    assert (parsed.limit_bytes, parsed.validation) == (1000, 0.0)
