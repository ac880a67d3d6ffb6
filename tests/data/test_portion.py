"""Tokens that travel: a folder of tokens written anew in small files, or a part of it."""

import numpy as np
import pytest

from data_helpers import build, stored, texts_of, write_jsonl
from query_experts.common.errors import SettingError
from query_experts.data import missing_files, portion, read_meta, write_portion


@pytest.fixture
def whole(tmp_path):
    held_out = write_jsonl(tmp_path / "held-out.jsonl", texts_of(70)[60:])
    path = write_jsonl(tmp_path / "x.jsonl", texts_of(60))
    return build(tmp_path, [path], validation=[held_out], seq_len=8, shard_bytes=1000)


def folder_of(corpus):
    return corpus.train.shards[0].parent


def test_tokens_in_smaller_files_are_the_same_tokens(tmp_path, whole):
    write_portion(folder_of(whole), tmp_path / "small", None, 100)
    small = build(tmp_path, [str(tmp_path / "small")], seq_len=8)
    assert all(shard.stat().st_size <= 100 for shard in (*small.train.shards, *small.validation.shards))
    assert len(small.train.shards) > len(whole.train.shards)
    assert small.facts == whole.facts
    assert np.array_equal(stored(small.train), stored(whole.train))
    assert np.array_equal(stored(small.validation), stored(whole.validation))


def test_a_part_keeps_validation_and_tokenizer_and_spreads_over_the_training_text(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(portion, "BLOCK", 16)
    info = write_portion(folder_of(whole), tmp_path / "part", 10 * 16 + 5, 200)
    part = build(tmp_path, [str(tmp_path / "part")], seq_len=8)
    assert info.train_tokens == part.train.tokens == 160
    assert part.facts.data_hash != whole.facts.data_hash
    assert np.array_equal(stored(part.validation), stored(whole.validation))
    assert part.validation_parts == whole.validation_parts
    assert part.tokenizer.get_vocab() == whole.tokenizer.get_vocab()
    sequences = [sequence["input_ids"].tolist() for sequence in whole.train]
    places = [sequences.index(sequence["input_ids"].tolist()) for sequence in part.train]
    assert places[0] == 0
    assert places == sorted(places)
    assert places[-1] > 0.8 * len(sequences)
    share = 160 / whole.facts.train_tokens
    assert info.train_bytes == round(share * whole.facts.train_bytes)


def test_equal_parts_have_one_hash_and_other_parts_another(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(portion, "BLOCK", 16)
    hashes = [
        write_portion(folder_of(whole), tmp_path / f"part-{number}", tokens, size).data_hash
        for number, (tokens, size) in enumerate([(160, 100), (160, 300), (320, 100)])
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_part_that_cannot_be_is_refused_and_leaves_nothing(tmp_path, whole):
    for source, target, tokens, words in [
        (tmp_path, "new", None, "must be a folder of tokens"),
        (folder_of(whole), "there", None, "it must be a new folder"),
        (folder_of(whole), "new", 4095, "tokens is 4095; it must be 4096 or more"),
    ]:
        (tmp_path / "there").mkdir(exist_ok=True)
        with pytest.raises(SettingError, match=words):
            write_portion(source, tmp_path / target, tokens and min(tokens, whole.facts.train_tokens - 1), 100)
    assert not (tmp_path / "new").exists()
    assert not [*tmp_path.glob(".building*")]


def test_files_that_have_not_come_yet_are_named(tmp_path, whole):
    write_portion(folder_of(whole), tmp_path / "small", None, 500)
    tokens = read_meta(tmp_path / "small")
    assert missing_files(tmp_path / "small", tokens) == []
    (tmp_path / "small" / "train-00001.bin").unlink()
    (tmp_path / "small" / "train-00002.bin").write_bytes(b"ab")
    assert missing_files(tmp_path / "small", tokens) == ["train-00001.bin", "train-00002.bin"]
