"""A long text has the tokens of the whole text, whatever its tokenizer, though it is tokenised in windows."""

import random
from unittest import mock

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from query_experts.data import tokenizing, windows
from query_experts.data.tokenizing import tokenize_documents

LINES = [
    "The naïve café in 東京 has a quick brown fox.", "    if value is None:", "", "\treturn  value", "  ", "Привет 🙂",
    "<s> or </s>", "\N{FULLWIDTH LATIN CAPITAL LETTER A} \N{LATIN SMALL LIGATURE FI}ne", "word-" * 9, "=" * 30, "\r",
]  # fmt: skip


def text_of(seed, lines=400):
    chosen = random.Random(seed)
    return "".join(chosen.choice(LINES) + chosen.choice(["\n", "\n\n", " ", "\n   "]) for _ in range(lines))


def byte_level(add_prefix_space):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    return tokenizer, trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def sentence_piece_bpe():
    """Without words: the marks of blanks are letters like any other, and one stands before the text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.ByteFallback()
    return tokenizer, trainers.BpeTrainer(special_tokens=["<unk>", *(f"<0x{n:02X}>" for n in range(256))])


def unigram(scheme):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return tokenizer, trainers.UnigramTrainer(unk_token="<unk>", special_tokens=["<unk>"])


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return tokenizer, trainers.WordPieceTrainer(special_tokens=["<unk>"])


KINDS = {
    "byte level": lambda: byte_level(False),
    "byte level, a blank before the text": lambda: byte_level(True),
    "sentencepiece BPE": sentence_piece_bpe,
    "unigram, marks of first words": lambda: unigram("first"),
    "unigram, marks of all words": lambda: unigram("always"),
    "word pieces": word_piece,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    tokenizer, trainer = KINDS[request.param]()
    trainer.vocab_size, trainer.show_progress = 500, False
    tokenizer.train_from_iterator(text_of(0).split("\n"), trainer)
    tokenizer.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(windows, "_WINDOW_CHARACTERS", 900)
    monkeypatch.setattr(windows, "_OVERLAP", 400)
    monkeypatch.setattr(tokenizing, "_BATCH_CHARACTERS", 2000)


RUN = "x" * 3000
TEXTS = {
    "lines": text_of(1), "other lines": text_of(2), "a long run": text_of(3, 90) + RUN + text_of(4, 90), "a run": RUN,
    "multi-byte": "東京🙂" * 900, "blanks": "a" + " " * 2500 + "b", "line breaks": "a" + "\n" * 2500 + "b",
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_the_tokens_are_those_of_the_whole_text(tokenizer, small_windows, name):
    text = TEXTS[name]
    documents = [("train", text, 0), ("validation", "short", 0), ("train", text, 0)]
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    expected = [[*backend.encode(one, add_special_tokens=False).ids, tokenizer.eos_token_id] for _, one, _ in documents]
    found, counted = [[]], [0]
    for piece in tokenize_documents(documents, tokenizer):
        found[-1] += piece.ids
        counted[-1] += piece.text_bytes
        if piece.ends_document:
            found.append([])
            counted.append(0)
    assert found == [*expected, []]
    assert counted == [*(len(one.encode()) for _, one, _ in documents), 0]


def test_the_tokens_come_in_pieces(tokenizer, small_windows):
    pieces = [*tokenize_documents([("train", TEXTS["lines"], 0)], tokenizer)]
    assert 3 < len(pieces) <= 1 + len(TEXTS["lines"]) // 900
    assert max(piece.text_bytes for piece in pieces) < len(TEXTS["lines"].encode()) / 2
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def of_characters(*before):
    """A tokenizer whose words, which `before` makes, have one token or one for each character."""
    splits = pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in "0123456789" for b in "0123456789"]
    backend = Tokenizer(
        models.BPE({word: i for i, word in enumerate([*alphabet, *(a + b for a, b in pairs), "</s>"])}, pairs)
    )
    backend.pre_tokenizer, backend.decoder = splits, decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.mark.parametrize("length", [6_000, 6_001, 30_001])
def test_no_token_is_lost_where_digits_are_grouped_from_an_end_that_a_window_does_not_know(small_windows, length):
    twos = of_characters(pre_tokenizers.Split(Regex(r"\d{1,2}(?=(?:\d{2})*\b)"), "isolated"))
    text = "".join(random.Random(length).choices("0123456789", k=length))
    pieces = [*tokenize_documents([("train", text, 0)], twos)]
    assert "".join(twos.decode(piece.ids, skip_special_tokens=True) for piece in pieces) == text
    assert sum(piece.text_bytes for piece in pieces) == length


def test_a_run_without_a_place_at_which_windows_agree_is_encoded_a_few_times_and_cut(small_windows, monkeypatch):
    monkeypatch.setattr(windows, "_seam", lambda before, after: None)
    encoded = []
    encode = windows._encoded
    monkeypatch.setattr(
        windows, "_encoded", lambda window, one: encoded.append(len(window.text)) or encode(window, one)
    )
    text = text_of(5, 3000)
    tokenizer = of_characters()
    pieces = [*tokenize_documents([("train", text, 0)], tokenizer)]
    assert "".join(tokenizer.decode(piece.ids, skip_special_tokens=True) for piece in pieces) == text
    assert max(piece.text_bytes for piece in pieces) < 5 * 900 * 4
    assert len(text) < sum(encoded) < 6 * len(text)


def test_only_parts_of_documents_are_encoded_with_offsets(small_windows, monkeypatch):
    monkeypatch.setattr(tokenizing, "_BATCH_CHARACTERS", 1 << 20)
    tokenizer = of_characters()
    backend = mock.Mock(wraps=tokenizer.backend_tokenizer)
    monkeypatch.setattr(tokenizing, "Tokenizer", mock.Mock(**{"from_str.return_value": backend}))
    texts = ["short", TEXTS["lines"], "another"]
    pieces = [*tokenize_documents([("train", text, 0) for text in texts], tokenizer)]
    assert tokenizer.decode([token for piece in pieces for token in piece.ids]) == "</s>".join([*texts, ""])
    fast, slow = (call.args[0] for call in (backend.encode_batch_fast.call_args, backend.encode_batch.call_args))
    assert [*fast] == ["short", "another"]
    assert len(slow) > 3
