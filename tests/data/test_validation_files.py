"""Files that are held out whole: the parts that they become, their limits, and what is refused."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_helpers import COMPRESS, build, documents, refused, stored, texts_of, write_jsonl
from query_experts.data import Corpus, CorpusInfo, ValidationPart
from query_experts.data import corpus as corpus_module
from query_experts.data import validation_files as files_module
from query_experts.data.readers import name_without_endings
from query_experts.data.validation_files import documents_within

BYTES = 257  # a vocabulary of bytes and the end-of-text token: a document has a token more than bytes


@pytest.fixture
def data(tmp_path) -> list[str]:
    """Forty documents to train on."""
    return [write_jsonl(tmp_path / "train.jsonl", texts_of(40))]


def held_out(count: int, name: str = "held") -> list[str]:
    return [f"{name} {text}" for text in texts_of(count)]


def sequences(corpus: Corpus) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in corpus.validation]


def part_tokens(corpus: Corpus, position: int) -> np.ndarray:
    """The tokens on disk of a part."""
    ends = np.cumsum([0, *(part.tokens for part in corpus.validation_parts)])
    return stored(corpus.validation)[ends[position] : ends[position + 1]]


# Without the option


@pytest.mark.parametrize(
    ("name", "settings", "folder", "data_hash"),
    [
        (
            "one.txt",
            {},
            "corpus-fed9842f4fcab7aa4502",
            "15b3490da41b49f6cec03ff65d5d745221913c8bfe02dd102782102a702584d7",
        ),
        (
            "many.jsonl",
            {"max_bytes": 5000, "validation_fraction": 0.2},
            "corpus-a5ccc86c4110b5dee6cb",
            "bcf2d433002be25b95963ee2f042a08584484538119b18912baf0f30618b7f94",
        ),
    ],
)
def test_without_validation_files_folders_hashes_and_facts_are_those_of_earlier_versions(
    tmp_path, monkeypatch, name, settings, folder, data_hash
):
    monkeypatch.chdir(tmp_path)
    lines = [f"line {i} of {i * i % 97}, naïve 東京\n" for i in range(400)]
    Path("one.txt").write_text("".join(lines), encoding="utf-8")
    rows = [json.dumps({"text": "".join(lines[i : i + 8])}) + "\n" for i in range(0, 400, 8)]
    Path("many.jsonl").write_text("".join(rows))
    os.utime(name, ns=(0, 10**18))
    corpus = build(tmp_path, [name], vocab_size=BYTES, **settings)
    assert corpus.facts.data_hash == data_hash
    meta = json.loads((tmp_path / "cache" / folder / "meta.json").read_text())
    assert list(meta["info"])[-2:] == ["validation_tokens", "validation_bytes"]
    assert corpus.validation_parts == corpus.facts.validation_files == []


# Parts


def test_files_are_held_out_whole_and_all_of_data_is_trained_on(tmp_path, data):
    wiki, code = held_out(5, "wiki"), held_out(6, "code")
    (tmp_path / "valid").mkdir()
    packed = COMPRESS[".xz"]("".join(json.dumps({"text": text}) + "\n" for text in wiki).encode())
    (tmp_path / "valid" / "wiki.valid.jsonl.xz").write_bytes(packed)
    (tmp_path / "valid" / "README.rst").write_text("no text that is read")
    single = tmp_path / "code.txt"
    single.write_text("".join(code))
    corpus = build(tmp_path, data, validation=[str(tmp_path / "valid"), str(single)])
    assert sorted(documents(corpus, corpus.train)) == sorted(texts_of(40))
    assert documents(corpus, corpus.validation) == ["".join(code), *wiki]  # parts in the order of their names
    facts = corpus.facts
    assert (facts.validation, facts.validation_fraction) == ("validation files", None)
    assert facts.skipped_files == {".rst": 1}
    assert [(file.name, file.documents) for file in facts.validation_files] == [("code", 1), ("wiki.valid", 5)]
    assert [file.bytes for file in facts.validation_files] == [len("".join(texts).encode()) for texts in (code, wiki)]
    for name in ("documents", "tokens", "bytes"):
        total = sum(getattr(file, name) for file in facts.validation_files)
        assert total == getattr(facts, f"validation_{name}")
    assert json.loads(json.dumps(corpus.info)) == corpus.info
    assert CorpusInfo(**vars(facts)) == facts


def test_no_sequence_spans_two_parts_and_the_rest_of_each_is_dropped(tmp_path, data):
    names = [
        write_jsonl(tmp_path / f"{name}.jsonl", held_out(count, name))
        for name, count in {"a": 3, "b": 4, "c": 2}.items()
    ]
    corpus = build(tmp_path, data, validation=names, seq_len=7, shard_bytes=100)
    expected, first = [], 0
    for position, part in enumerate(corpus.validation_parts):
        tokens = part_tokens(corpus, position)
        whole = [tokens[7 * i : 7 * i + 7].tolist() for i in range(len(tokens) // 7)]
        assert (part.name, part.first_sequence, part.sequences) == ("abc"[position], first, len(whole))
        expected, first = expected + whole, first + len(whole)
    assert any(part.tokens % 7 for part in corpus.validation_parts[:-1])
    assert sequences(corpus) == expected
    assert len(corpus.validation) == len(expected)
    assert corpus.validation[-1]["input_ids"].tolist() == expected[-1]
    with pytest.raises(IndexError):
        corpus.validation[len(expected)]
    copy = pickle.loads(pickle.dumps(corpus.validation))
    assert [row["input_ids"].tolist() for row in copy] == expected


def test_a_part_counts_the_bytes_of_its_text_and_the_tokens_with_one_more_for_each_document(tmp_path, data):
    validation = write_jsonl(tmp_path / "x.jsonl", ["naïve", "東京"])
    corpus = build(tmp_path, data, validation=[validation], vocab_size=BYTES, seq_len=5)
    assert corpus.validation_parts == [ValidationPart("x", 0, 2, tokens=6 + 1 + 6 + 1, text_bytes=12)]


@pytest.mark.parametrize(
    ("name", "part"),
    [("wiki.valid.jsonl.xz", "wiki.valid"), ("a.TXT", "a"), ("b.parquet", "b"), ("c.d.md.zst", "c.d"), (".txt", "")],
)
def test_a_part_is_named_as_its_file_without_endings(name, part):
    assert name_without_endings(Path("texts.txt") / name) == part


def test_the_tokenizer_knows_nothing_of_the_validation_files(tmp_path, data):
    validation = [write_jsonl(tmp_path / "greek.jsonl", [" Ωμέγα" * 100])]
    tokenizer = build(tmp_path, data, vocab_size=1000, validation=validation).tokenizer
    assert len(tokenizer.encode(" Ωμέγα", add_special_tokens=False)) > 6
    assert len(tokenizer.encode(" quick", add_special_tokens=False)) == 1


# Limits


def test_max_bytes_limits_the_training_text_only(tmp_path, data):
    validation = [write_jsonl(tmp_path / "x.jsonl", held_out(20))]
    corpus = build(tmp_path, data, validation=validation, max_bytes=1000)
    assert corpus.facts.train_bytes <= 1000 < corpus.facts.validation_bytes
    assert documents(corpus, corpus.validation) == held_out(20)


def test_a_file_gives_whole_documents_up_to_the_limit_of_each_file(tmp_path, data, monkeypatch):
    monkeypatch.setattr(files_module, "FILE_TOKENS", 100)
    texts = ["a" * 59, "b" * 38, "c", "d"]  # 60 and 39 tokens, and 2 that are one too many
    validation = [write_jsonl(tmp_path / f"{name}.jsonl", [name + text for text in texts]) for name in "xy"]
    corpus = build(tmp_path, data, validation=validation, vocab_size=BYTES)
    assert [part.tokens for part in corpus.validation_parts] == [61, 61]
    shorter = [write_jsonl(tmp_path / "z.jsonl", ["a" * 59, "b" * 39, "c"])]
    exact = build(tmp_path, data, validation=shorter, vocab_size=BYTES)
    assert [(part.tokens, part.text_bytes) for part in exact.validation_parts] == [(100, 98)]


def test_only_a_first_document_that_is_longer_than_the_limit_is_cut_at_a_line_break(tmp_path, data, monkeypatch):
    monkeypatch.setattr(files_module, "FILE_TOKENS", 100)
    monkeypatch.setattr("query_experts.data.windows._WINDOW_CHARACTERS", 40)
    monkeypatch.setattr("query_experts.data.windows._OVERLAP", 80)
    text = "".join(f"line {i} 東京\n" for i in range(50))
    validation = [write_jsonl(tmp_path / "x.jsonl", [text, "another"])]
    corpus = build(tmp_path, data, validation=validation, vocab_size=BYTES)
    (kept,) = documents(corpus, corpus.validation)
    assert text.startswith(kept)
    assert kept.endswith("京\n")
    (part,) = corpus.validation_parts
    assert 80 < part.tokens <= 100
    assert part.text_bytes == len(kept.encode()) == part.tokens - 1


def test_a_cut_holds_the_limit_where_its_text_has_more_tokens_than_the_rest(tmp_path, data):
    tokenizer = build(tmp_path, data, vocab_size=400).tokenizer
    (pieces,) = documents_within(60, ["Ω" * 50 + " quick brown fox" * 400], tokenizer)
    assert 0 < sum(len(piece.ids) for piece in pieces) <= 60
    assert tokenizer.decode([i for piece in pieces for i in piece.ids]).startswith("Ω")


# Duplicates


def test_exact_duplicates_are_kept_once_on_each_side(tmp_path):
    data = [write_jsonl(tmp_path / "train.jsonl", texts_of(9) * 2)]
    first, second = held_out(4, "first"), held_out(3, "second")
    validation = [
        write_jsonl(tmp_path / "a.jsonl", [*first, first[0]]),
        write_jsonl(tmp_path / "b.jsonl", [first[1], *second]),
    ]
    corpus = build(tmp_path, data, validation=validation)
    assert documents(corpus, corpus.validation) == first + second
    assert [file.documents for file in corpus.facts.validation_files] == [4, 3]
    assert corpus.facts.duplicate_documents == 9 + 2


def test_documents_on_both_sides_are_refused_with_the_file_and_their_number(tmp_path, data):
    clean = write_jsonl(tmp_path / "a.jsonl", held_out(3))
    both = write_jsonl(tmp_path / "b.jsonl", [*held_out(4, "other"), *texts_of(40)[7:10]])
    message = refused(tmp_path, data, validation=[clean, both])
    assert message == (
        f"validation holds {both!r}, which shares 3 documents with data; a document must be on one side only"
    )
    assert not (tmp_path / "cache").exists()
    assert "shares 1 document with" in refused(
        tmp_path, [clean], validation=[write_jsonl(tmp_path / "c.jsonl", [held_out(2)[1]])]
    )


def test_a_document_that_is_cut_is_still_known_as_one_of_data(tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "FILE_TOKENS", 50)
    text = "".join(texts_of(30))
    data = [write_jsonl(tmp_path / "train.jsonl", [*texts_of(3), text])]
    for limit in (None, 2000):  # which cuts it in data too
        message = refused(tmp_path, data, validation=[write_jsonl(tmp_path / "x.jsonl", [text])], max_bytes=limit)
        assert "shares 1 document with data" in message


def test_documents_beyond_the_limits_may_be_on_both_sides(tmp_path, data, monkeypatch):
    monkeypatch.setattr(files_module, "FILE_TOKENS", 400)
    validation = [write_jsonl(tmp_path / "x.jsonl", [*held_out(1), *texts_of(9)])]
    assert "shares" in refused(tmp_path, data, validation=validation, vocab_size=2000)
    monkeypatch.setattr(files_module, "FILE_TOKENS", 250)
    corpus = build(tmp_path, data, validation=validation, vocab_size=BYTES)
    assert [file.documents for file in corpus.facts.validation_files] == [1]


# The cache


def test_a_changed_file_another_one_and_another_limit_build_again(tmp_path, data, monkeypatch):
    builds = []
    real = corpus_module.tokenize_documents
    monkeypatch.setattr(corpus_module, "tokenize_documents", lambda *args: builds.append(1) or real(*args))
    path = Path(write_jsonl(tmp_path / "x.jsonl", held_out(5)))
    first = build(tmp_path, data, validation=[str(path)])
    assert build(tmp_path, data, validation=[str(path)]).info == first.info
    assert build(tmp_path, data, validation=[str(path)], seq_len=5).info == first.info | {"seq_len": 5}
    assert len(builds) == 1
    os.utime(path, ns=(1, 1))
    assert build(tmp_path, data, validation=[str(path)]).info == first.info
    hashes = {first.facts.data_hash, build(tmp_path, data).facts.data_hash}
    other = str(path.rename(tmp_path / "y.jsonl"))
    hashes.add(build(tmp_path, data, validation=[other]).facts.data_hash)
    monkeypatch.setattr(files_module, "FILE_TOKENS", 400)
    hashes.add(build(tmp_path, data, validation=[other]).facts.data_hash)
    assert (len(builds), len(hashes)) == (5, 4)


def test_the_hash_knows_where_a_part_ends(tmp_path, data):
    texts = held_out(4)
    hashes = set()
    for cut in (1, 2):
        validation = [write_jsonl(tmp_path / "a.jsonl", texts[:cut]), write_jsonl(tmp_path / "b.jsonl", texts[cut:])]
        corpus = build(tmp_path, data, validation=validation)
        assert documents(corpus, corpus.validation) == texts
        hashes.add(corpus.facts.data_hash)
        shutil.rmtree(tmp_path / "cache")
    assert len(hashes) == 2


def test_a_folder_of_tokens_keeps_its_parts_and_takes_no_validation_files(tmp_path, data):
    validation = [write_jsonl(tmp_path / f"{name}.jsonl", held_out(5, name)) for name in "ab"]
    first = build(tmp_path, data, validation=validation)
    held = sequences(first)
    (made,) = (tmp_path / "cache").iterdir()
    folder = shutil.move(made, tmp_path / "carried")
    for path in (*data, *validation):
        Path(path).unlink()
    carried = build(tmp_path, [str(folder)])
    assert carried.info == first.info
    assert carried.validation_parts == first.validation_parts
    assert sequences(carried) == held
    message = refused(tmp_path, [str(folder)], validation=validation)
    assert message.startswith(f"validation holds {validation!r}, but data is a folder of tokens, which has its own ")


# What is refused


def test_entries_that_cannot_be_read_are_named_as_validation(tmp_path, data):
    (tmp_path / "x.bin").write_bytes(b"1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"body": "x"}\n')
    for entry, said in {
        "owner/name": "which doesn't exist; an entry is a file or folder of .txt",
        "owner/name:config": "which doesn't exist; ",
        "": "; an entry is a file or folder",
        str(tmp_path / "x.bin"): "a kind of file that can't be read; ",
        str(tmp_path / "empty"): "a folder without a file that can be read",
        str(tmp_path / "bad.jsonl"): "where line 1 has no 'text' among its fields (body)",
    }.items():
        message = refused(tmp_path, data, validation=[entry])
        assert message.startswith(f"validation holds {entry!r}")
        assert said in message
        assert "hub" not in message


def test_two_files_of_one_name_are_refused(tmp_path, data):
    one, two = write_jsonl(tmp_path / "one" / "x.jsonl", ["a"]), write_jsonl(tmp_path / "two" / "x.jsonl.bak", ["b"])
    two = str(Path(two).rename(tmp_path / "two" / "x.txt"))
    message = refused(tmp_path, data, validation=[one, two])
    assert message.startswith("validation holds ")
    assert repr(one) in message
    assert repr(two) in message
    assert message.endswith("whose names without endings are the same; each file must have a name of its own")


def test_files_without_text_of_their_own_are_refused(tmp_path, data):
    empty, folder = tmp_path / "x.txt", tmp_path / "folder"
    empty.touch()
    assert refused(tmp_path, data, validation=[str(empty)]) == (
        f"validation holds {str(empty)!r}, which is an empty file; a file must hold some text"
    )
    folder.mkdir()
    shutil.copy(empty, folder)
    blank = write_jsonl(tmp_path / "blank.jsonl", ["", " \n"])
    first, copy = (write_jsonl(tmp_path / f"{name}.jsonl", held_out(3)) for name in "ab")
    for validation, named in (([str(folder)], str(folder / "x.txt")), ([blank], blank), ([first, copy], copy)):
        message = refused(tmp_path, data, validation=validation)
        assert message.startswith(f"validation holds {named!r}, in which there is no text, or only text of other ")


def test_a_file_too_short_for_a_sequence_is_named_and_a_shorter_length_works(tmp_path, data):
    validation = [
        write_jsonl(tmp_path / "long.jsonl", held_out(9)),
        write_jsonl(tmp_path / "short.jsonl", ["four"]),
    ]
    message = refused(tmp_path, data, validation=validation, vocab_size=BYTES)
    assert message == (
        "seq_len is 8, but the validation file 'short' has only 5 tokens (1 document); it must be at most that, or "
        "give more text"
    )
    assert build(tmp_path, data, validation=validation, vocab_size=BYTES, seq_len=5).validation_parts[1].sequences == 1
