"""`query_experts.data`: every source and format, the split, the tokenizer, the shards and the cache."""

import errno
import json
import logging
import os
import pickle
import platform
import sys
import sysconfig
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
import pytest
from torch.utils.data import DataLoader

from data_helpers import COMPRESS, all_documents, build, documents, refused, stored, table_bytes, texts_of, write_jsonl
from query_experts.data import CorpusInfo, TokenSequences, readers, tokenizing, windows
from query_experts.data import corpus as corpus_module
from query_experts.data.documents import SplitDocuments
from query_experts.data.readers import python_source, read_file
from query_experts.data.shards import ShardWriter, token_dtype
from query_experts.data.sources import find_sources


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """The hub has every data set that is asked for."""
    monkeypatch.setattr(readers, "missing_on_hub", lambda name, repo_type: None)


# Formats and sources


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
def test_a_text_file_is_one_document_in_any_compression(tmp_path, suffix, compression):
    texts = texts_of(4)
    for i, text in enumerate(texts):
        (tmp_path / f"{i}{suffix}{compression}").write_bytes(COMPRESS[compression](text.encode()))
    corpus = build(tmp_path, [str(tmp_path / f"{i}{suffix}{compression}") for i in range(4)])
    assert all_documents(corpus) == sorted(texts)
    assert corpus.info["train_documents"] == corpus.info["validation_documents"] == 4


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_jsonl_line_is_one_document_in_any_compression(tmp_path, compression):
    texts = texts_of(9)
    lines = "\n\n".join(json.dumps({"body": text}, ensure_ascii=False) for text in texts)
    path = tmp_path / f"x.jsonl{compression}"
    path.write_bytes(COMPRESS[compression](lines.encode()))
    assert all_documents(build(tmp_path, [str(path)], text_field="body")) == sorted(texts)


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_parquet_row_is_one_document_in_any_compression(tmp_path, compression):
    texts = texts_of(9)
    path = tmp_path / f"x.parquet{compression}"
    path.write_bytes(COMPRESS[compression](table_bytes([*texts, None], tmp_path)))
    assert all_documents(build(tmp_path, [str(path)])) == sorted(texts)


def test_a_zst_file_of_several_frames_is_read_to_its_end(tmp_path):
    texts = texts_of(6)
    frames = [COMPRESS[".zst"]((json.dumps({"text": text}) + "\n").encode()) for text in texts]
    (tmp_path / "x.jsonl.zst").write_bytes(b"".join(frames))
    assert all_documents(build(tmp_path, [str(tmp_path / "x.jsonl.zst")])) == sorted(texts)


def test_a_folder_is_read_recursively_without_hidden_and_foreign_files(tmp_path):
    root = tmp_path / "texts"
    texts = texts_of(7)
    names = ["a.txt", "b.md", "deep/c.py", "deep/er/d.txt", ".hidden.txt", ".git/e.txt", "f.bin"]
    for name, text in zip(names, texts, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "empty.txt").touch()
    assert all_documents(build(tmp_path, [str(root)])) == sorted(texts[:4])


@pytest.fixture
def linked(tmp_path):
    """A folder with one text; another folder with two is beside it."""
    for name in ("texts/a.txt", "beside/b.txt", "beside/deep/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"This is {name}\n" * 9)
    return tmp_path / "texts"


def names_of(folder, skipped=None):
    sources = find_sources([str(folder)])
    assert sources.skipped == (skipped or {})
    return sorted(file.name for file in sources.files)


def test_links_to_files_and_folders_are_read(linked):
    (linked / "link").symlink_to("../beside")
    (linked.parent / "alone.txt").write_text("text")
    (linked / "d.txt").symlink_to("../alone.txt")
    assert names_of(linked) == ["a.txt", "d.txt", "link/b.txt", "link/deep/c.txt"]
    (linked.parent / "all").symlink_to("texts")
    assert names_of(linked.parent / "all") == names_of(linked)


def test_a_folder_is_read_once_whatever_leads_to_it(linked):
    for name, target in (("k", "../beside/deep"), ("l", "../beside"), ("m", "../beside"), ("n", "l")):
        (linked / name).symlink_to(target)
    assert names_of(linked) == ["a.txt", "k/c.txt", "l/b.txt"]
    (linked / "z").mkdir()
    (linked / "z" / "e.txt").write_text("text")
    (linked / "b").symlink_to("z")
    assert names_of(linked) == ["a.txt", "k/c.txt", "l/b.txt", "z/e.txt"]


def test_a_link_to_a_folder_around_it_is_counted_and_not_followed(linked):
    (linked / "here").symlink_to(".")
    (linked / "up").symlink_to("..")
    (linked / "root").symlink_to("/")
    (linked / "link").symlink_to("../beside")
    (linked.parent / "beside" / "back").symlink_to("../texts")
    (linked.parent / "beside" / "deep" / "up").symlink_to("..")
    names = ["a.txt", "link/b.txt", "link/deep/c.txt"]
    assert names_of(linked, {"link to a folder around it": 5}) == names


@pytest.mark.parametrize("name", ["x.txt", "books", "books.v2"])
def test_a_link_to_nothing_or_to_itself_is_refused(tmp_path, linked, name):
    (linked / ".hidden").symlink_to("nowhere")
    assert names_of(linked) == ["a.txt"]
    for target, words in (("nowhere", "is a link to nothing"), (name, "is a link to itself")):
        (linked / name).symlink_to(target)
        assert f"texts', where {name!r} {words}; a link must" in refused(tmp_path, [str(linked)])
        assert f"{name}', which {words}; a link must" in refused(tmp_path, [str(linked / name)])
        (linked / name).unlink()


def test_a_link_to_a_hidden_folder_is_hidden(linked):
    for hidden in (linked / ".store" / "deep", linked.parent / ".aside"):
        hidden.mkdir(parents=True)
        (hidden / "b.txt").write_text("hidden")
    for name, target in (("b", ".store"), ("c", ".store/deep"), ("d", "../.aside")):
        (linked / name).symlink_to(target)
    assert names_of(linked) == ["a.txt"]
    (linked / "x.txt").symlink_to(".store/deep/b.txt")  # a name that isn't hidden
    assert names_of(linked) == ["a.txt", "x.txt"]


def test_a_file_of_several_names_is_read_once(linked, monkeypatch):
    beside = linked.parent / "beside"
    (linked / "b.txt").symlink_to("../beside/b.txt")
    os.link(linked / "a.txt", linked / "z.txt")
    (linked.parent / "link").symlink_to("texts")
    entries = [str(entry) for entry in (linked, linked / "a.txt", beside, beside / "deep", linked.parent / "link")]
    found = [file.path.resolve() for file in find_sources(entries).files]
    assert len(found) == 3
    assert {os.stat(path).st_ino for path in found} == {
        os.stat(path).st_ino for path in (linked / "a.txt", beside / "b.txt", beside / "deep" / "c.txt")
    }
    assert len(find_sources([str(linked)]).files) == 2

    def without_inode(path, **kwargs):
        mode, _, *others = stat(path, **kwargs)
        return os.stat_result([mode, 0, *others])

    stat = Path.stat
    monkeypatch.setattr(Path, "stat", without_inode)
    assert len(find_sources([str(linked)]).files) == 3


def test_what_is_neither_a_file_nor_a_folder_is_counted(linked):
    os.mkfifo(linked / "pipe.txt")
    assert names_of(linked, {".txt": 1}) == ["a.txt"]


def test_a_folder_that_is_closed_to_the_user_is_named(tmp_path, linked, monkeypatch):
    (linked / "closed").mkdir()
    scan = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert "closed' can't be read: Permission denied" in refused(tmp_path, [str(linked)])


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    for i, text in enumerate(texts_of(2)):
        (tmp_path / f"{i}.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    corpus = build(tmp_path, [str(tmp_path / "0.txt"), str(tmp_path / "1.txt")])
    assert all_documents(corpus) == sorted(texts_of(2))


def test_line_ends_and_special_token_text_survive(tmp_path):
    texts = ["windows\r\nold mac\rend <|endoftext|> not an end\n" * 3, *texts_of(3)]
    corpus = build(tmp_path, [write_jsonl(tmp_path / "x.jsonl", texts)], validation_fraction=0.01)
    ids = np.concatenate([stored(corpus.train), stored(corpus.validation)])
    assert (ids == corpus.tokenizer.eos_token_id).sum() == 4
    assert texts[0] in corpus.tokenizer.decode(ids.tolist())


def test_a_hub_data_set_is_streamed_from_its_train_split(tmp_path, monkeypatch):
    texts = texts_of(20)
    path = write_jsonl(tmp_path / "x.jsonl", texts, "body")
    real, asked = datasets.load_dataset, []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        return real("json", data_files=path, split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = build(tmp_path, ["some-owner/some.name:sample-10BT"], text_field="body")
    assert asked == [("some-owner/some.name", "sample-10BT", "train", True)]
    assert all_documents(corpus) == sorted(texts)
    assert corpus.info["source"] == ["some-owner/some.name:sample-10BT"]
    message = refused(tmp_path, ["some-owner/some.name"], text_field="text")
    assert "'some-owner/some.name'" in message
    assert "id, body" in message
    assert "text_field" in message


def test_the_default_is_the_standard_library_up_to_a_byte_limit(tmp_path):
    corpus = build(tmp_path, None, max_bytes=100_000)
    assert 99_000 < corpus.info["train_bytes"] + corpus.info["validation_bytes"] <= 100_000
    assert corpus.info["source"] == [f"python standard library {platform.python_version()}"]
    known = {text for file in find_sources(None).files for text in python_source(file.path)}
    taken = all_documents(corpus)
    assert len(known.intersection(taken)) >= len(taken) - 1
    assert all(any(text.startswith(one) for text in known) for one in taken)


def test_the_standard_library_is_read_without_tests_packages_and_undecodable_files(tmp_path, monkeypatch):
    texts = texts_of(9)
    skipped = ["test", "json/tests", "site-packages/x", "dist-packages", "__pycache__", "idlelib", "lib2to3"]
    for name, text in zip(["a", "json/b", *(f"{folder}/c" for folder in skipped)], texts, strict=True):
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / f"{name}.py").write_text(text)
    (tmp_path / "lib" / "latin.py").write_bytes("# coding: latin-1\n# déjà vu\n".encode("latin-1"))
    (tmp_path / "lib" / "bad.py").write_bytes(b"# \xff\n")
    (tmp_path / "lib" / "worse.py").write_bytes(b"# coding: no-such-encoding\n")
    (tmp_path / "lib" / "notes.txt").write_text("not Python")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    assert all_documents(build(tmp_path, None)) == sorted([*texts[:2], "# coding: latin-1\n# déjà vu\n"])
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    assert "this Python has none on disk" in refused(tmp_path, None)


def test_a_byte_limit_takes_a_fixed_sample_of_a_folder_that_is_not_alphabetical(tmp_path):
    taken = []
    for root in (tmp_path / "one", tmp_path / "two"):
        root.mkdir()
        for i, text in enumerate(texts_of(40)):
            (root / f"{i:02d}.txt").write_text(text)
        corpus = build(tmp_path, [str(root)], max_bytes=4_000)
        taken.append((all_documents(corpus), corpus.info["data_hash"]))
        assert 3_000 < corpus.info["train_bytes"] + corpus.info["validation_bytes"] <= 4_000
    assert taken[0] == taken[1]
    assert taken[0][0] != sorted(texts_of(40)[: len(taken[0][0])])


@pytest.mark.parametrize("before", [[], ["a short one\n"], texts_of(5)])
def test_the_document_that_passes_the_limit_is_cut_at_a_line_break_and_is_the_last(tmp_path, before):
    long = "".join(f"line {i} ü\n" for i in range(1000))
    path = write_jsonl(tmp_path / "x.jsonl", [*before, long, *texts_of(9)[5:]])
    corpus = build(tmp_path, [path], max_bytes=5_000, validation_fraction=0.1)
    (cut,) = set(all_documents(corpus)) - set(before)
    assert sorted([*before, cut]) == all_documents(corpus)
    assert long.startswith(cut)
    assert cut.endswith("ü\n")
    assert 4_980 < corpus.info["train_bytes"] + corpus.info["validation_bytes"] <= 5_000


def kept(texts: Iterable[str], max_bytes: int) -> list[str]:
    return sorted(text for _, text, _ in SplitDocuments(texts, 0.5, max_bytes))


def test_the_cut_fills_the_limit_and_splits_no_character():
    assert kept(["one", "two", "title\n" + 99 * "ü"], 6 + 21) == ["one", "title\n" + 7 * "ü", "two"]
    assert kept(["one", "two", " \n" * 99 + "three"], 50) == ["one", "two"]
    assert kept(["one", "two", " \n" * 99, "one", "three"], 9) == ["one", "thr", "two"]


@pytest.mark.parametrize(
    ("text", "room", "cut"),
    [
        ("12345\nabcdefgh", 11, "12345\n"),
        ("12345\nabcdefgh", 12, "12345\nabcdef"),  # half is not more than half
        ("1234567\n890\nxyz", 12, "1234567\n890\n"),  # the last byte there is room for
        ("1234567\n8901\nxyz", 12, "1234567\n"),
        (10 * " \n" + "three", 23, 10 * " \n" + "thr"),  # lines of white space are no text
    ],
)
def test_the_cut_keeps_whole_lines_where_they_fill_more_than_half_of_the_room(text, room, cut):
    assert kept(["one", "two", text], 6 + room) == sorted(["one", "two", cut])


def test_nothing_is_read_once_the_limit_is_reached():
    def texts():
        yield from ("one", "two\nand a half")
        raise AssertionError("read on")

    assert kept(texts(), 17) == ["one", "two\nand a half"]
    assert kept(texts(), 7) == ["one", "two\n"]


# The split


def test_the_split_is_by_document_and_does_not_depend_on_order(tmp_path):
    texts = texts_of(300, lines=2)
    held_out = []
    for name, ordered in (("a.jsonl", texts), ("b.jsonl", texts[::-1])):
        corpus = build(tmp_path, [write_jsonl(tmp_path / name, ordered)], validation_fraction=0.1)
        held_out.append(set(documents(corpus, corpus.validation)))
        assert held_out[-1].isdisjoint(documents(corpus, corpus.train))
        assert corpus.info["validation"] == "held-out documents"
    assert held_out[0] == held_out[1]
    assert 15 <= len(held_out[0]) <= 45


def test_exact_duplicates_are_kept_once(tmp_path):
    texts = texts_of(10)
    corpus = build(tmp_path, [write_jsonl(tmp_path / "x.jsonl", texts * 3)])
    assert all_documents(corpus) == sorted(texts)
    assert corpus.info["duplicate_documents"] == 20


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_each_side_has_a_document_whenever_there_are_two(count, fraction):
    texts = texts_of(count)
    sides = [list(SplitDocuments(order, fraction, None)) for order in (texts, texts[::-1])]
    assert sorted(sides[0]) == sorted(sides[1])
    assert {split for split, _, _ in sides[0]} == {"train", "validation"}
    assert sorted(text for _, text, _ in sides[0]) == sorted(texts)


def test_the_tail_of_an_only_document_is_held_out_from_a_line_break_on(tmp_path):
    text = "".join(f"line {i} of the only document\n" for i in range(2000))
    (tmp_path / "x.txt").write_text(text)
    corpus = build(tmp_path, [str(tmp_path / "x.txt")])
    (train,), (validation,) = documents(corpus, corpus.train), documents(corpus, corpus.validation)
    assert train + validation == text
    assert train.endswith("\n")
    assert len(validation) == pytest.approx(0.02 * len(text), rel=0.05)
    assert corpus.info["validation"] == "tails of the documents"
    whole = build(tmp_path, [write_jsonl(tmp_path / "x.jsonl", [text])])
    assert whole.info == {**corpus.info, "source": [str(tmp_path / "x.jsonl")]}


@pytest.mark.parametrize("compression", ["", ".gz"])
def test_the_tail_of_each_of_a_few_files_is_held_out(tmp_path, compression):
    texts = ["".join(f"line {i} of {size}\n" for i in range(size)) for size in (15_000, 1_500, 700)]
    for i, text in enumerate(texts):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{i}.md{compression}").write_bytes(COMPRESS[compression](text.encode()))
    corpus = build(tmp_path, [str(tmp_path / "texts")])
    train, validation = documents(corpus, corpus.train), documents(corpus, corpus.validation)
    assert sorted(head + tail for head, tail in zip(train, validation, strict=True)) == sorted(texts)
    for head, tail in zip(train, validation, strict=True):
        assert head.endswith("\n")
        assert len(tail) == pytest.approx(0.02 * len(head + tail), rel=0.1)
    assert corpus.info["validation"] == "tails of the documents"


def test_whole_documents_are_held_out_where_files_are_many_or_hold_several(tmp_path):
    for i, text in enumerate(texts_of(60)):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{i}.txt").write_text(text)
    folder, lines = str(tmp_path / "texts"), write_jsonl(tmp_path / "x.jsonl", texts_of(9))
    assert build(tmp_path, [folder]).info["validation"] == "held-out documents"
    assert build(tmp_path, [folder], max_bytes=4_000).info["validation"] == "tails of the documents"
    mixed = build(tmp_path, [str(tmp_path / "texts" / "0.txt"), lines])
    assert mixed.info["validation"] == "held-out documents"
    assert not find_sources([folder + "/0.txt", "owner/name"]).few_documents(None)


def test_a_document_too_short_for_a_tail_stays_whole():
    texts = ["a", "b" * 40]
    for fraction, whole in ((1e-17, "train"), (0.99, "validation")):
        split = [(side, text) for side, text, _ in SplitDocuments(texts, fraction, None, tails=True)]
        assert (whole, "a") in split
        assert all(text for _, text in split)


@pytest.mark.parametrize(
    ("breaks", "fraction", "head"),
    [
        ([], 0.2, 80),
        ([60], 0.2, 61),  # twice the tail
        ([59], 0.2, 80),
        ([89], 0.2, 90),  # half the tail
        ([90], 0.2, 80),
        ([75, 82], 0.2, 83),  # the nearer
        ([77, 84], 0.2, 78),
        ([62, 77], 0.2, 78),
        ([81, 88], 0.2, 82),
        ([10], 0.6, 11),  # twice the tail is more than there is
    ],
)
def test_a_tail_begins_at_the_line_break_nearest_to_its_share_from_half_to_twice_of_it(breaks, fraction, head):
    text = "".join("\n" if i in breaks else "x" for i in range(100))
    parts = [("train", text[:head], head), ("validation", text[head:], 100 - head)]
    assert list(SplitDocuments([text], fraction, None, tails=True)) == parts


# Tokens and tokenizers


def test_info_counts_what_is_stored_and_is_json(tmp_path):
    texts = texts_of(40)
    path = write_jsonl(tmp_path / "x.jsonl", texts)
    corpus = build(tmp_path, [path], validation_fraction=0.2)
    info = json.loads(json.dumps(corpus.info))
    assert info == corpus.info
    assert CorpusInfo(**info) == corpus.facts
    assert info["source"] == [path]
    assert info["train_bytes"] == sum(len(text.encode()) for text in documents(corpus, corpus.train))
    assert info["train_bytes"] + info["validation_bytes"] == sum(len(text.encode()) for text in texts)
    assert info["train_documents"] == len(documents(corpus, corpus.train))
    assert info["train_tokens"] == corpus.train.tokens == stored(corpus.train).size
    assert info["validation_tokens"] == corpus.validation.tokens == stored(corpus.validation).size
    assert info["vocab_size"] == len(corpus.tokenizer) == 300
    assert info["seq_len"] == 8
    assert len(info["data_hash"]) == 64


def test_sequences_are_consecutive_int64_and_the_rest_is_dropped(tmp_path):
    corpus = build(tmp_path, [write_jsonl(tmp_path / "x.jsonl", texts_of(30))], seq_len=7)
    tokens = stored(corpus.train)
    assert len(corpus.train) == tokens.size // 7
    for i in range(len(corpus.train)):
        item = corpus.train[i]
        assert set(item) == {"input_ids", "labels"}
        assert str(item["input_ids"].dtype) == "torch.int64"
        assert item["input_ids"].shape == (7,)
        assert item["input_ids"].tolist() == item["labels"].tolist() == tokens[7 * i : 7 * i + 7].tolist()
    assert corpus.train[-1]["input_ids"].tolist() == corpus.train[len(corpus.train) - 1]["input_ids"].tolist()
    with pytest.raises(IndexError):
        corpus.train[len(corpus.train)]


@pytest.mark.parametrize("shard_bytes", [4, 26, 150])
def test_small_shards_hold_the_same_tokens_and_sequences(tmp_path, shard_bytes):
    path = write_jsonl(tmp_path / "x.jsonl", texts_of(8, lines=4))
    whole = build(tmp_path, [path])
    parts = build(tmp_path, [path], shard_bytes=shard_bytes)
    assert len(whole.train.shards) == 1 < len(parts.train.shards)
    assert all(shard.stat().st_size <= shard_bytes for shard in parts.train.shards)
    assert stored(parts.train).tolist() == stored(whole.train).tolist()
    assert [x["input_ids"].tolist() for x in parts.train] == [x["input_ids"].tolist() for x in whole.train]
    assert parts.info["data_hash"] == whole.info["data_hash"]


def test_ids_beyond_sixteen_bits_are_stored_in_thirty_two(tmp_path):
    assert (token_dtype(2**16), token_dtype(2**16 + 1)) == ("<u2", "<u4")
    writer = ShardWriter(tmp_path, "train", "<u4", shard_bytes=10)
    for block in ([1, 70_000, 3], [], [2**31, 5]):
        writer.append(block)
    sequences = TokenSequences([tmp_path / name for name in writer.shards], "<u4", seq_len=5)
    assert sequences[0]["input_ids"].tolist() == [1, 70_000, 3, 2**31, 5]
    assert [path.stat().st_size for path in sequences.shards] == [8, 8, 4]


def test_a_document_of_several_pieces_has_one_end_and_its_exact_text(tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "_WINDOW_CHARACTERS", 500)
    monkeypatch.setattr(windows, "_OVERLAP", 200)
    monkeypatch.setattr(tokenizing, "_BATCH_CHARACTERS", 1200)
    texts = ["".join(f"{i} naïve 東京\n" for i in range(400)), "東" * 1700, "short " * 20, "x" * 500]
    assert all_documents(build(tmp_path, [write_jsonl(tmp_path / "x.jsonl", texts)])) == sorted(texts)


def test_the_tokenizer_is_trained_on_the_training_split_only(tmp_path):
    words = ["".join(chr(0x0100 + 40 * i + j) for j in range(6)) for i in range(12)]
    texts = [f" {word}" * 60 for word in words]
    corpus = build(tmp_path, [write_jsonl(tmp_path / "x.jsonl", texts)], vocab_size=1000, validation_fraction=0.3)
    held_out = set(documents(corpus, corpus.validation))
    assert 0 < len(held_out) < 12
    for word, text in zip(words, texts, strict=True):
        pieces = len(corpus.tokenizer.encode(f" {word}", add_special_tokens=False))
        assert pieces > 6 if text in held_out else pieces == 1


def test_the_tokenizer_is_trained_on_the_first_ten_megabytes_at_most(tmp_path, monkeypatch):
    seen = []
    real = corpus_module.train_bpe
    monkeypatch.setattr(corpus_module, "TRAINING_BYTES", 2_000)
    monkeypatch.setattr(corpus_module, "train_bpe", lambda texts, *rest: real(seen.extend(texts) or seen, *rest))
    texts = texts_of(60)
    corpus = build(tmp_path, [write_jsonl(tmp_path / "x.jsonl", texts)])
    assert tokenizing.TRAINING_BYTES == 10_000_000
    assert 2_000 <= sum(len(text.encode()) for text in seen) < 2_500
    assert all_documents(corpus) == sorted(texts)


def test_a_trained_tokenizer_begins_ends_and_pads_with_the_same_token(tmp_path):
    tokenizer = build(tmp_path, [write_jsonl(tmp_path / "x.jsonl", texts_of(5))]).tokenizer
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == "<|endoftext|>"
    text = " Ünïcode ☃ 東\t\n\x00 and  spaces ,  kept "
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_given_tokenizer_is_used_as_it_is(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", texts_of(5))
    build(tmp_path, [path]).tokenizer.save_pretrained(tmp_path / "mine")
    other = write_jsonl(tmp_path / "y.jsonl", texts_of(9))
    corpus = build(tmp_path, [other], tokenizer=str(tmp_path / "mine"), vocab_size=1)
    assert corpus.info["tokenizer"] == str(tmp_path / "mine")
    assert corpus.info["vocab_size"] == len(corpus.tokenizer) == 300
    assert all_documents(corpus) == sorted(texts_of(9))


def test_progress_leaves_stdout_alone(tmp_path, capfd):
    build(tmp_path, [write_jsonl(tmp_path / "x.jsonl", texts_of(50))], progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "training the tokenizer" in err


def test_worker_processes_and_pickled_copies_read_the_same(tmp_path):
    train = build(tmp_path, [write_jsonl(tmp_path / "x.jsonl", texts_of(10))], shard_bytes=100).train
    expected = [item["input_ids"].tolist() for item in train]
    copy = pickle.loads(pickle.dumps(train))
    assert [item["input_ids"].tolist() for item in copy] == expected
    batches = [batch["labels"].tolist() for batch in DataLoader(train, batch_size=4, num_workers=1)]
    assert [ids for batch in batches for ids in batch] == expected


def test_tokenizing_leaves_no_fork_warning_and_keeps_what_the_user_set(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "x.jsonl", texts_of(5))
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    build(tmp_path, [path])
    assert os.environ["TOKENIZERS_PARALLELISM"].lower() == "false"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    build(tmp_path, [path], vocab_size=301)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


# The cache


@pytest.fixture
def builds(monkeypatch):
    """One entry for each time that text is tokenised."""
    count = []
    real = corpus_module.tokenize_documents
    monkeypatch.setattr(corpus_module, "tokenize_documents", lambda *args: count.append(1) or real(*args))
    return count


def test_a_second_call_tokenises_nothing_even_at_another_sequence_length(tmp_path, builds):
    path = write_jsonl(tmp_path / "x.jsonl", texts_of(10))
    first, second = build(tmp_path, [path]), build(tmp_path, [path])
    assert first.info == second.info
    assert [x["input_ids"].tolist() for x in first.train] == [x["input_ids"].tolist() for x in second.train]
    assert build(tmp_path, [path], seq_len=5).info == {**first.info, "seq_len": 5}
    assert len(builds) == 1


def test_a_changed_file_or_setting_builds_again(tmp_path, builds):
    path = Path(write_jsonl(tmp_path / "x.jsonl", texts_of(10)))
    first = build(tmp_path, [str(path)])
    path.write_text(path.read_text().replace("quick", "brisk"))
    os.utime(path, ns=(1, 1))
    assert build(tmp_path, [str(path)]).info["data_hash"] != first.info["data_hash"]
    os.utime(path, ns=(1, 2))
    build(tmp_path, [str(path)])
    for changed in ({"vocab_size": 310}, {"validation_fraction": 0.4}, {"max_bytes": 2000}, {"shard_bytes": 50}):
        build(tmp_path, [str(path)], **changed)
    assert len(builds) == 7


def test_a_new_file_in_a_folder_builds_again(tmp_path, builds):
    for i, text in enumerate(texts_of(3)):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{i}.txt").write_text(text)
        if i:
            assert len(all_documents(build(tmp_path, [str(tmp_path / "texts")]))) == i + 1
    assert len(builds) == 2


def test_a_damaged_cache_is_built_again(tmp_path, builds):
    path = write_jsonl(tmp_path / "x.jsonl", texts_of(10))
    first = build(tmp_path, [path])
    first.train.shards[0].write_bytes(b"\x00\x00")
    assert build(tmp_path, [path]).train.tokens == first.train.tokens
    first.validation.shards[0].unlink()
    assert build(tmp_path, [path]).info == first.info
    assert len(builds) == 3


@pytest.mark.parametrize("name", ["meta.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"])
@pytest.mark.parametrize(
    "content", [b"{", b"{}", b"[]", b"null", b"[" * 100_000, b'{"sizes": {}}', b'{"sizes": []}', b"\xff", None]
)
def test_a_damaged_meta_or_tokenizer_is_built_again(tmp_path, builds, name, content):
    path = write_jsonl(tmp_path / "x.jsonl", texts_of(10))
    first = build(tmp_path, [path])
    (damaged,) = (tmp_path / "cache").glob(f"corpus-*/{name}")
    damaged.unlink() if content is None else damaged.write_bytes(content)
    second = build(tmp_path, [path])
    assert second.info == first.info
    assert all_documents(second) == sorted(texts_of(10))
    assert len(builds) == 2


@pytest.mark.parametrize("content", ["{}", "[]", "7", "{", '{"shards": [], "info": {}}', '{"sizes": {"0.txt": 1}}'])
def test_a_folder_of_text_with_a_foreign_meta_is_text(tmp_path, content):
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(texts_of(3)):
        (tmp_path / "texts" / f"{i}.txt").write_text(text)
    (tmp_path / "texts" / "meta.json").write_text(content)
    assert all_documents(build(tmp_path, [str(tmp_path / "texts")])) == sorted(texts_of(3))


def test_a_folder_of_tokens_says_what_it_was_made_with(tmp_path, builds, monkeypatch):
    made = {"max_bytes": 900, "validation_fraction": 0.3, "text_field": "body", "vocab_size": 310}
    first = build(tmp_path, [write_jsonl(tmp_path / "x.jsonl", texts_of(10), "body")], **made)
    assert first.info.items() >= made.items()
    (folder,) = (tmp_path / "cache").iterdir()
    monkeypatch.setenv("HOME", str(tmp_path / "cache"))
    for name in (str(folder), f"~/{folder.name}"):
        assert build(tmp_path, [name], max_bytes=5, vocab_size=300, tokenizer="any", text_field="x").info == first.info
    assert len(builds) == 1


def test_an_interrupted_build_leaves_nothing_and_the_next_one_works(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "x.jsonl", texts_of(10))
    real, calls = ShardWriter.append, []

    def append(self, ids):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(self, ids)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", append)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, [path])
    assert not (tmp_path / "cache").exists()
    assert all_documents(build(tmp_path, [path])) == sorted(texts_of(10))


def test_a_killed_builds_folder_is_never_used_and_is_removed_after_a_day(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", texts_of(10))
    old, recent = tmp_path / "cache" / ".building-old", tmp_path / "cache" / ".building-recent"
    for left in (old, recent):
        left.mkdir(parents=True)
        (left / "train-00000.bin").write_bytes(b"xx")
    for part in (old / "train-00000.bin", old):
        os.utime(part, (time.time() - 2 * 86400,) * 2)
    build(tmp_path, [path])
    assert not old.exists()
    assert recent.exists()


def test_two_builds_at_once_give_the_same_corpus(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "x.jsonl", texts_of(10))
    together, results = threading.Barrier(2, timeout=10), []
    real = corpus_module._publish

    def publish(building, folder):
        together.wait()
        real(building, folder)

    monkeypatch.setattr(corpus_module, "_publish", publish)
    threads = [threading.Thread(target=lambda: results.append(build(tmp_path, [path]))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert results[0].info == results[1].info
    assert all_documents(results[0]) == all_documents(results[1]) == sorted(texts_of(10))
    assert len(list((tmp_path / "cache").iterdir())) == 1


# What is refused


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("seq_len", 1),
        ("seq_len", True),
        ("vocab_size", 256),
        ("vocab_size", 4096.0),
        ("validation_fraction", 0),
        ("validation_fraction", 1.0),
        ("validation_fraction", "some"),
        ("max_bytes", 0),
        ("shard_bytes", 3),
        ("text_field", ""),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_value(tmp_path, setting, value):
    message = refused(tmp_path, None, **{setting: value})
    assert message.startswith(f"{setting} is {value!r}; it must be ")
    assert not (tmp_path / "cache").exists()


def test_the_smallest_vocabulary_is_bytes_and_the_end_of_text(tmp_path):
    corpus = build(tmp_path, [write_jsonl(tmp_path / "x.jsonl", texts_of(5))], vocab_size=257)
    assert corpus.info["vocab_size"] == 257
    assert all_documents(corpus) == sorted(texts_of(5))


@pytest.mark.parametrize("name", ["nowhere.txt", "./no/where", "no/where.jsonl.zst", "/no/such/folder", "nowhere"])
def test_a_missing_path_is_said_to_be_missing(tmp_path, name):
    message = refused(tmp_path, [name])
    assert message.startswith(f"data holds {name!r}, which doesn't exist; ")
    assert ".parquet" in message
    assert "owner/name" in message


def test_no_entries_a_foreign_file_and_a_folder_without_text_are_refused(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"1")
    (tmp_path / "empty").mkdir()
    assert "data is an empty list" in refused(tmp_path, [])
    assert refused(tmp_path, [""]).startswith("data holds ''; an entry is a file or folder")
    assert "data holds '/dev/null', which is neither a file nor a folder" in refused(tmp_path, ["/dev/null"])
    assert "x.bin', a kind of file that can't be read" in refused(tmp_path, [str(tmp_path / "x.bin")])
    assert "empty', a folder without a file that can be read" in refused(tmp_path, [str(tmp_path / "empty")])


def test_an_empty_file_and_text_of_white_space_only_are_refused(tmp_path):
    (tmp_path / "x.txt").touch()
    assert "x.txt', which is an empty file" in refused(tmp_path, [str(tmp_path / "x.txt")])
    path = write_jsonl(tmp_path / "x.jsonl", ["", " \n"])
    assert "x.jsonl'], in which there is no text" in refused(tmp_path, [path])
    assert not (tmp_path / "cache").exists()


def test_a_file_that_is_not_utf8_is_named_with_the_byte(tmp_path):
    (tmp_path / "x.txt").write_bytes("ab東".encode() + b"\xff rest")
    assert "x.txt', which is not UTF-8 at byte 5 " in refused(tmp_path, [str(tmp_path / "x.txt")])
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xe9"}\n')
    assert "x.jsonl', which is not UTF-8 at byte 27 " in refused(tmp_path, [str(tmp_path / "x.jsonl")])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "line 3 is not JSON (Expecting value at column "),
        ('["text"]', "line 3 is a JSON list"),
        ('{"id": 1, "body": "x"}', "line 3 has no 'text' among its fields (id, body)"),
        ('{"text": 5}', "line 3 has 'text' of type int"),
        ('{"text": {"a": 1, "a": 2}}', "line 3 has 'text' of type dict"),
        ('{"text": "ab\\ud800"}', "line 3 has half a surrogate pair in 'text' at character 2"),
        (f'{{"text": {"9" * 5000}}}', "line 3 has 'text' of type int"),
        ('{"text": NaN}', "line 3 has 'text' of type float"),
        ('{"text": "x", "id": 5, "text": "y"}', "line 3 has 'text' more than once"),
        (r'{"text": "x", "t\u0065xt": "y"}', "line 3 has 'text' more than once"),
        ('{"text": "x", "meta": ' + "[" * 100_000, "line 3 is not JSON (nested too deeply)"),
        ('{"text": "x"}\r{"text": "y"}', "line 3 is not JSON (Extra data at column 15)"),
        ('{"text": "x\0"}', "line 3 is not JSON (Invalid control character"),
    ],
    ids=lambda value: value[:40],
)
def test_a_bad_jsonl_line_is_named_with_file_and_number(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_text('{"text": "one"}\n{"text": null}\n' + line + "\n")
    assert f"x.jsonl', where {message}" in refused(tmp_path, [str(tmp_path / "x.jsonl")])


@pytest.mark.parametrize(
    "metadata",
    [
        "9" * 5000, "-" + "9" * 5000, "NaN", "[-Infinity, 1e9999]", '{"text": "inner", "a": {"text": 5, "text": 6}}',
        '"\\ud800"', '5, "id": 6', "[" * 500 + "]" * 500,
    ],
    ids=lambda value: value[:40],
)  # fmt: skip
def test_a_text_is_read_whatever_stands_beside_it(tmp_path, metadata):
    (tmp_path / "x.jsonl").write_text(f'{{"id": {metadata}, "text": "one"}}\n', encoding="utf-8")
    assert [*read_file(tmp_path / "x.jsonl", "text", tmp_path)] == ["one"]


@pytest.mark.parametrize(
    "content",
    [
        b'{"text": "one"}\n{"text": "two"}', b'\xef\xbb\xbf{"text": "one"}\n\n \n{"text": "two"}\n',
        b'{"text": "one"}\r\n\r\n{"text": "two"}\r\n',
    ],
    ids=["no line break at the end", "byte order mark and blank lines", "line breaks of Windows"],
)  # fmt: skip
@pytest.mark.parametrize("compression", COMPRESS)
def test_lines_are_read_as_programs_of_any_system_write_them(tmp_path, content, compression):
    path = tmp_path / f"x.jsonl{compression}"
    path.write_bytes(COMPRESS[compression](content))
    assert [*read_file(path, "text", tmp_path)] == ["one", "two"]


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.txt.gz"])
def test_utf_16_is_no_text(tmp_path, name):
    (tmp_path / name).write_bytes(COMPRESS[Path(name).suffix if name.endswith("gz") else ""]("one".encode("utf-16")))
    assert f"{name}', which is not UTF-8 at byte 0 " in refused(tmp_path, [str(tmp_path / name)])


def test_a_parquet_table_without_the_column_names_those_it_has(tmp_path):
    (tmp_path / "x.parquet").write_bytes(table_bytes(texts_of(3), tmp_path, "body"))
    message = refused(tmp_path, [str(tmp_path / "x.parquet")])
    assert "x.parquet', a table that has no 'text' among its columns (id, body); text_field must" in message
    assert "row 1 has 'id' of type int" in refused(tmp_path, [str(tmp_path / "x.parquet")], text_field="id")


def test_a_damaged_parquet_file_is_refused(tmp_path):
    (tmp_path / "x.parquet").write_bytes(table_bytes(texts_of(3), tmp_path)[:-20])
    assert "x.parquet', which can't be read as parquet" in refused(tmp_path, [str(tmp_path / "x.parquet")])


@pytest.mark.parametrize("harm", ["cut", "foreign"])
@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_a_broken_compressed_file_is_refused(tmp_path, compression, harm):
    packed = COMPRESS[compression]("".join(texts_of(50)).encode())
    path = tmp_path / f"x.txt{compression}"
    path.write_bytes(packed[: len(packed) // 2] if harm == "cut" else b"this is plain text, not compressed")
    assert f"x.txt{compression}', which is damaged, cut short or" in refused(tmp_path, [str(path)])
    assert not (tmp_path / "cache").exists()


def test_a_split_shorter_than_a_sequence_is_refused_and_a_shorter_one_works(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", ["one two three", "four five six", "seven eight nine", "ten", "eleven"])
    message = refused(tmp_path, [path], seq_len=1000)
    assert message.startswith("seq_len is 1000, but the train split of data has only ")
    message = refused(tmp_path, [path], seq_len=20)
    assert "the validation split of data has only " in message
    assert message.endswith("; it must be at most that, or give more text")
    assert len(build(tmp_path, [path], seq_len=2).train) > 1


@pytest.mark.parametrize("package", ["datasets", "zstandard", "pyarrow"])
def test_an_absent_package_is_named_with_the_extra_that_brings_it(tmp_path, monkeypatch, package):
    (tmp_path / "x.txt.zst").write_bytes(COMPRESS[".zst"](b"text"))
    (tmp_path / "x.parquet").write_bytes(table_bytes(["text"], tmp_path))
    data = {"datasets": "owner/name", "zstandard": tmp_path / "x.txt.zst", "pyarrow": tmp_path / "x.parquet"}
    monkeypatch.setitem(sys.modules, package, None)
    message = refused(tmp_path, [str(data[package])])
    assert f"needs the package {package}; install it with `pip install query-experts[data]`" in message


@pytest.mark.parametrize("error", [ConnectionError("offline"), ValueError("Bad split: train"), RuntimeError("scripts")])
def test_a_hub_data_set_that_cannot_be_loaded_is_named(tmp_path, monkeypatch, error):
    def load_dataset(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = refused(tmp_path, ["owner/name:config"])
    assert message.startswith("data holds 'owner/name:config', which is no file or folder here, and no data set")
    assert str(error) in message


@pytest.mark.parametrize("error", [None, ConnectionError("offline")])
def test_the_hub_is_tried_without_a_warning_for_each_try(tmp_path, monkeypatch, error):
    loggers = [logging.getLogger(name) for name in ("datasets.utils.file_utils", "huggingface_hub.utils._http")]

    def load_dataset(*args, **kwargs):
        assert not any(logger.isEnabledFor(logging.WARNING) for logger in loggers)
        if error:
            raise error
        return [{"text": text} for text in texts_of(9)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    if error:
        refused(tmp_path, ["owner/name"])
    else:
        build(tmp_path, ["owner/name"])
    assert all(logger.isEnabledFor(logging.WARNING) for logger in loggers)


def test_a_hub_stream_that_breaks_off_says_after_which_row(tmp_path, monkeypatch):
    def rows(*args, **kwargs):
        yield {"text": "one"}
        yield {"text": "two"}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", rows)
    assert "can't be read past row 2 (reset by peer)" in refused(tmp_path, ["owner/name"])
    assert not (tmp_path / "cache").exists()


def test_a_tokenizer_that_cannot_be_loaded_or_ends_nothing_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", texts_of(5))
    (tmp_path / "bad").mkdir()
    assert refused(tmp_path, [path], tokenizer="").startswith("tokenizer is ''; it must be a folder that holds")
    assert "bad', a folder that holds none; it must be" in refused(tmp_path, [path], tokenizer=str(tmp_path / "bad"))
    (tmp_path / "bad" / "tokenizer.json").write_text("{")
    message = refused(tmp_path, [path], tokenizer=str(tmp_path / "bad"))
    assert message.startswith("tokenizer is ")
    assert "bad', which can't be loaded (" in message
    tokenizer = build(tmp_path, [path]).tokenizer
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    assert "endless', which has no eos_token" in refused(tmp_path, [path], tokenizer=str(tmp_path / "endless"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_folder_and_the_need(tmp_path, monkeypatch, number):
    path = write_jsonl(tmp_path / "x.jsonl", texts_of(200))
    real, calls = ShardWriter.append, []

    def append(self, ids):
        calls.append(1)
        if len(calls) > 50:
            raise OSError(number, os.strerror(number))
        real(self, ids)

    monkeypatch.setattr(ShardWriter, "append", append)
    message = refused(tmp_path, [path])
    assert message.startswith(f"cache_dir is {str(tmp_path / 'cache')!r}, whose disk is full: 0.0 MB of tokens were")
    assert "MB is needed" in message
    assert not (tmp_path / "cache").exists()


def test_no_room_for_the_tokenizer_is_a_full_disk(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(corpus_module.shutil, "disk_usage", lambda folder: usage)
    path = write_jsonl(tmp_path / "x.jsonl", texts_of(5))
    assert "whose disk is full" in refused(tmp_path, [path])


def test_a_cache_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "cache").write_text("a file")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    path = write_jsonl(tmp_path / "x.jsonl", texts_of(5))
    for folder in (tmp_path / "cache", tmp_path / "cache" / "below", tmp_path / "loop", tmp_path / ("x" * 300)):
        message = refused(tmp_path, [path], cache_dir=folder)
        assert message.startswith(f"cache_dir is {str(folder)!r}, where the tokens can't be written (")
    if sys.platform == "linux":
        assert "'/proc/x', where the tokens can't be written (" in refused(tmp_path, [path], cache_dir=Path("/proc/x"))


@pytest.mark.parametrize("function", ["mkdir", "rename", "write_text"])
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_cache_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch, function, number):
    path = write_jsonl(tmp_path / "x.jsonl", texts_of(5))

    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(Path, function, refuse)
        assert f"where the tokens can't be written ({os.strerror(number)})" in refused(tmp_path, [path])
    assert all_documents(build(tmp_path, [path])) == sorted(texts_of(5))


def test_a_read_only_cache_that_holds_the_tokens_is_used(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "x.jsonl", texts_of(5))
    first = build(tmp_path, [path])
    monkeypatch.setattr(Path, "mkdir", lambda *args, **kwargs: pytest.fail("written to"))
    assert build(tmp_path, [path]).info == first.info
