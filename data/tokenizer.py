"""Text → token ids: any Hugging Face tokenizer.json, plain bytes, or a byte-level BPE trained on the spot.

Whatever the kind, a tokenizer.json comes out, which is what transformers and evaluation harnesses load. Special tokens
spelled out in a text are encoded as the ordinary characters they are: only the end of a document is an end of text.
"""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tokenizers
import xxhash
from tokenizers import decoders, models, pre_tokenizers, trainers

from data.errors import DataError

END_OF_TEXT = "<|endoftext|>"
KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "<|end▁of▁sentence|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
TRAINED_CHARACTERS = 8_000_000  # of text a BPE is trained on: seconds, and more text moves few merges at these sizes
CHECKED_CHARACTERS = 1_000_000  # of text on which the fast encoder must agree with the reference before it is used
ODD_TEXT = f" \t\r\n\n  x  'll don't  1234567 äöß e\u0301 \u4f60\u597d \U0001f600\x00\x7f {END_OF_TEXT}</s>  "
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what ByteLevel splits by


class Tokenizer:
    """Encodes whole documents, each with the end-of-text id after it."""

    def __init__(self, definition: str, end: str | None, workers: int, sample: Sequence[str]):
        """`definition` is the text of a tokenizer.json; `sample` decides whether the fast encoder may be used."""
        try:
            self._reference = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the Rust side raises bare Exception
            raise DataError(f"the tokenizer is no Hugging Face tokenizer.json ({error}); give another file") from None
        self._reference.encode_special_tokens = True
        self._reference.no_truncation()  # a saved maximum length would silently cut documents
        self._reference.no_padding()
        self._threads = ThreadPoolExecutor(workers)
        self.definition = definition
        self.hash = xxhash.xxh3_128_hexdigest(definition.encode())
        self.vocabulary = max(self._reference.get_vocab(with_added_tokens=True).values()) + 1
        self.eos = self._end_id(end)
        self._fast = _fast_encoder(json.loads(definition))
        if self._fast and not all(map(np.array_equal, self._by_fast(sample), self._by_reference(sample))):
            self._fast = None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One uint32 array per text, the end-of-text id last."""
        arrays = self._by_fast(texts) if self._fast else self._by_reference(texts)
        return [np.append(ids, np.uint32(self.eos)) for ids in arrays]

    def _by_fast(self, texts: Sequence[str]) -> list[np.ndarray]:
        return list(self._threads.map(self._fast, texts))  # releases the interpreter lock while it works

    def _by_reference(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._reference.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def _end_id(self, end: str | None) -> int:
        if end is not None:
            if (token := self._reference.token_to_id(end)) is None:
                raise DataError(f"eos={end!r} is no token of the tokenizer; name one of {self._special_tokens()}")
            return token
        for name in KNOWN_ENDS:
            if (token := self._reference.token_to_id(name)) is not None:
                return token
        raise DataError(
            f"the tokenizer has none of the usual end-of-text tokens; choose by eos= from {self._special_tokens()}"
        )

    def _special_tokens(self) -> str:
        added = self._reference.get_added_tokens_decoder().values()
        special = ", ".join(repr(token.content) for token in added if token.special)
        return special or "its vocabulary (it has no special tokens)"


def make_tokenizer(choice: str, end: str | None, workers: int, sample: Callable[[int], list[str]]) -> Tokenizer:
    """The tokenizer that `choice` names: "bytes", "train:VOCABULARY" or the path of a tokenizer.json.

    `sample(n)` gives about n characters of the input's text, always the same.
    """
    kind, _, size = choice.partition(":")
    if choice == "bytes":
        return Tokenizer(_bytes_definition(), end, workers, [ODD_TEXT])
    if kind == "train":
        if not size.isdecimal() or int(size) < 257:
            raise DataError(f"tokenizer={choice} needs at least 257 tokens (256 bytes and the end), as in train:8192")
        definition = _train(sample(TRAINED_CHARACTERS), int(size))
    else:
        definition = read_definition(choice)
    return Tokenizer(definition, end, workers, [ODD_TEXT, *sample(CHECKED_CHARACTERS)])


def read_definition(path: str) -> str:
    """The text of a tokenizer.json, given it or its folder."""
    file = Path(path, "tokenizer.json") if Path(path).is_dir() else Path(path)
    try:
        return file.read_bytes().decode()
    except FileNotFoundError:
        raise DataError(f"tokenizer={path} is no file; use bytes, train:8192 or the path of a tokenizer.json") from None
    except UnicodeDecodeError:
        raise DataError(f"tokenizer={path} is not text; give the path of a Hugging Face tokenizer.json") from None


def _train(sample: list[str], vocabulary: int) -> str:
    """A byte-level BPE: id 0 ends a text, then the 256 bytes, then the merges in the order they were learned."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer.to_str(pretty=True)


def _bytes_definition() -> str:
    """Ids 0–255 are the bytes themselves, 256 ends a text."""
    tokenizer = tokenizers.Tokenizer(models.BPE(_byte_of_char(), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer.to_str(pretty=True)


def _fast_encoder(definition: dict):
    """text → uint32 ids for the kinds of tokenizer where something faster is known to do the same, or None.

    tiktoken merges by token id, Hugging Face by place in the list of merges: for byte-level BPE whose merges are
    numbered in order the two are the same algorithm, and tiktoken is 6 to 8 times faster on a core.
    """
    model, split = definition["model"], _split_pattern(definition.get("pre_tokenizer"))
    if model["type"] != "BPE" or split is None or definition.get("normalizer"):
        return None
    if not model["merges"] and split == "":
        return lambda text: np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)
    odd_options = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if split == "" or any(map(model.get, odd_options)) or not all(t["special"] for t in definition["added_tokens"]):
        return None
    vocabulary = model["vocab"]
    merged = [vocabulary["".join(pair.split(" ") if isinstance(pair, str) else pair)] for pair in model["merges"]]
    if merged != sorted(merged):
        return None
    try:
        import tiktoken  # an accelerator, no requirement
    except ImportError:
        return None
    special = {token["content"] for token in definition["added_tokens"]}
    byte = _byte_of_char()
    try:
        ranks = {bytes(byte[c] for c in token): number for token, number in vocabulary.items() if token not in special}
        if not all(bytes([value]) in ranks for value in range(256)):
            return None
        encoding = tiktoken.Encoding("corpus", pat_str=split, mergeable_ranks=ranks, special_tokens={})
    except (KeyError, ValueError):  # not byte-level after all, or a regular expression only the other engine reads
        return None
    return lambda text: encoding.encode_to_numpy(text, disallowed_special=())


def _split_pattern(pre_tokenizer: dict | None) -> str | None:
    """The regular expression a byte-level pre-tokenizer cuts words by, "" if it cuts nowhere, None for other kinds."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {"type": None}])
    *before, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if not before:
        return GPT2_SPLIT if last.get("use_regex", True) else ""
    if len(before) > 1 or last.get("use_regex", True) or before[0]["type"] != "Split":
        return None
    split = before[0]
    return split["pattern"].get("Regex") if split["behavior"] == "Isolated" and not split["invert"] else None


def _byte_of_char() -> dict[str, int]:
    """Byte-level vocabularies spell printable bytes as themselves and the others as the characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in sorted(printable)} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
