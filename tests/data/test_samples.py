"""Samples and steps: what a window holds, and that ranks together see exactly the reference sequence."""

import threading

import pytest
import torch

from data import DataError, PackedSamples, micro_batches, prefetch


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def joined(batches: list[dict]) -> dict:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


@pytest.fixture
def samples(make_corpus):
    sources = [(make_corpus("a"), 3.0), (make_corpus("b", seed=1), 1.0)]
    return PackedSamples(sources, "train", sequence_length=64, seed=5)


def test_masks_follow_documents_as_a_naive_loop_does(corpus_folder):
    S = 128
    samples = PackedSamples([(corpus_folder, 1.0)], "train", S, seed=0, ordered=True)
    corpus = samples.corpora[0]
    stream = corpus.read(0, corpus.tokens).tokens.tolist()
    for j in range(samples.windows[0]):
        sample = samples[j]
        start = 0
        for t in range(S):
            token, label = stream[j * S + t], stream[j * S + t + 1]
            assert (sample["tokens"][t], sample["labels"][t]) == (token, label)
            if t and stream[j * S + t - 1] == corpus.eos:
                start = t
            assert sample["document_start"][t] == start
            assert sample["loss_mask"][t] == (0 if token == corpus.eos else 1)
    assert {name: tensor.dtype for name, tensor in sample.items()} == {
        "tokens": torch.int64,
        "labels": torch.int64,
        "loss_mask": torch.float32,
        "document_start": torch.int32,
    }


def test_without_document_masks_a_window_is_one_document(corpus_folder):
    masked, plain = (
        PackedSamples([(corpus_folder, 1.0)], "train", 512, seed=0, mask_documents=mask)[0] for mask in (True, False)
    )
    assert masked["document_start"].any() and not masked["loss_mask"].all()
    assert not plain["document_start"].any() and plain["loss_mask"].all()
    assert torch.equal(masked["tokens"], plain["tokens"])


def test_a_window_of_4L_is_four_adjacent_windows_of_L(corpus_folder):
    short, long = (PackedSamples([(corpus_folder, 1.0)], "train", S, seed=0, ordered=True) for S in (64, 256))
    assert long.windows[0] == short.windows[0] // 4
    for j in range(long.windows[0]):
        quarters = [short[4 * j + i] for i in range(4)]
        for name in ("tokens", "labels", "loss_mask"):
            assert torch.equal(long[j][name], torch.cat([quarter[name] for quarter in quarters])), name


def test_ordered_samples_are_the_windows_of_each_source_in_turn(make_corpus):
    folders = [make_corpus("a"), make_corpus("b", seed=1)]
    both = PackedSamples([(folder, 1.0) for folder in folders], "validation", 32, seed=0, ordered=True)
    alone = [PackedSamples([(folder, 1.0)], "validation", 32, seed=9, ordered=True) for folder in folders]
    everything = list(both)  # ends by itself
    assert len(everything) == sum(both.windows)
    assert all(map(equal, everything, [*alone[0], *alone[1]]))


@pytest.mark.parametrize("data_size", [1, 2, 3, 8])
def test_the_union_over_ranks_is_the_reference_for_any_number_of_ranks(samples, data_size):
    consumed, global_batch, micro_batch = 4090, 48, 2  # across the end of a cycle
    ranks = [micro_batches(samples, consumed, global_batch, r, data_size, micro_batch) for r in range(data_size)]
    assert all(len(batches) == global_batch // data_size // micro_batch for batches in ranks)
    assert all(batch["tokens"].shape == (micro_batch, 64) for batches in ranks for batch in batches)
    union = joined([batch for batches in ranks for batch in batches])
    reference = {name: torch.stack([samples[consumed + i][name] for i in range(global_batch)]) for name in union}
    assert equal(union, reference)


def test_resuming_far_away_with_other_ranks_gives_the_same_samples(samples):
    far = 10**11
    straight = joined(micro_batches(samples, far, 24, 0, 1, 4))
    resumed = joined([b for r in range(3) for b in micro_batches(samples, far, 12, r, 3, 4)])
    resumed_again = joined([b for r in range(2) for b in micro_batches(samples, far + 12, 12, r, 2, 2)])
    assert equal(straight, joined([resumed, resumed_again]))


def test_the_fingerprint_covers_sources_weights_and_seed_but_not_the_sequence_length(make_corpus):
    a, b = make_corpus("a"), make_corpus("b", seed=1)

    def fingerprint(sources, S=64, seed=5):
        return PackedSamples(sources, "train", S, seed).fingerprint

    reference = fingerprint([(a, 3), (b, 1)])
    assert fingerprint([(a, 3), (b, 1)], S=128) == reference == fingerprint([(a, 0.75), (b, 0.25)])
    others = [fingerprint([(a, 3), (b, 2)]), fingerprint([(a, 3), (b, 1)], seed=6), fingerprint([(b, 3), (a, 1)])]
    assert len({reference, *others}) == 4


def test_mistakes_name_both_values(make_corpus, samples):
    corpus = make_corpus("a")
    with pytest.raises(DataError, match=r"has [\d,]+ tokens, one window of sequence_length=1000000 needs 1,000,001"):
        PackedSamples([(corpus, 1.0)], "train", 10**6, seed=0)
    with pytest.raises(DataError, match="global_batch=10 is no multiple of 3 .* micro_batch=2; use 6 or 12"):
        micro_batches(samples, 0, 10, 0, 3, 2)
    with pytest.raises(DataError, match="have different tokenizers .*; prepare one with tokenizer="):
        PackedSamples([(corpus, 1.0), (make_corpus("bpe", tokenizer="train:300"), 1.0)], "train", 64, seed=0)
    with pytest.raises(DataError, match="list of data sources is empty"):
        PackedSamples([], "train", 64, seed=0)
    assert samples.vocabulary == 257


def test_prefetching_changes_neither_the_items_nor_their_errors():
    def items():
        yield from range(5)
        raise ValueError("broken")

    found = []
    with pytest.raises(ValueError, match="broken"):
        for item in prefetch(items()):
            found.append(item)
    assert found == list(range(5))
    endless = prefetch(iter(int, 1))
    next(endless)
    endless.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("data-prefetch")]
