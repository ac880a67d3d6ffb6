"""`query-experts data`: the tokens of `prepare`, whatever the workers, kills and shards; and what is refused."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import zstandard
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, RandomSampler

from data_helpers import COMPRESS, build, table_bytes, texts_of, write_jsonl
from query_experts.cli import main
from query_experts.common.errors import SettingError
from query_experts.data import preparation, prepare, readers, token_folder, workers, write_portion
from query_experts.data.checking import check_folder
from query_experts.data.digests import Digests
from query_experts.data.estimate import Estimate
from query_experts.data.folder import read_meta
from query_experts.data.preparation import prepare_folder
from query_experts.data.shards import ShardWriter
from query_experts.data.sources import find_sources
from query_experts.data.token_settings import TokenSettings


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Pieces of a few documents, each of which is brought to the disk; and a hub that has every data set."""
    monkeypatch.setattr(preparation, "PIECE_CHARACTERS", 2_000)
    monkeypatch.setattr(preparation, "COMMIT_BYTES", 1)
    monkeypatch.setattr(readers, "missing_on_hub", lambda name, repo_type: None)
    monkeypatch.setattr(token_folder, "hub_revision", lambda name: "c0ffee")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of texts in several formats, some of them twice; and a file of others."""
    folder = tmp_path_factory.mktemp("source") / "texts"
    texts = texts_of(90)
    write_jsonl(folder / "a.jsonl", texts[:40] + texts[:5])
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(Path(folder / "a.jsonl").read_bytes()[9_000:]))
    (folder / "b.jsonl.zst").unlink()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[38:70])
    (folder / "b.jsonl.xz").write_bytes(COMPRESS[".xz"](lines.encode()))
    (folder / "c.parquet").write_bytes(table_bytes([*texts[70:88], None], folder))
    (folder / "made").unlink()
    (folder / "d.txt").write_text(texts[88])
    return folder


HELD_OUT = texts_of(120)[100:]


def settings(**changes) -> TokenSettings:
    values = {"vocab_size": 300, "tokenizer": None, "validation_fraction": 0.1, "max_bytes": None}
    return TokenSettings(**values | {"shard_bytes": 5_000, "text_field": "text"} | changes)


def prepared(data, out, validation=(), workers=1, **changes):
    return prepare_folder([str(data)], out, settings(**changes), validation=validation, workers=workers, progress=False)


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expected(data, tmp_path, **changes):
    """The corpus that `prepare` makes."""
    return build(tmp_path, [str(data)], validation_fraction=0.1, shard_bytes=5_000, **changes)


def assert_same(out, corpus):
    opened = prepare([str(out)], cache_dir=out.parent / "unused", seq_len=8)
    assert opened.facts == corpus.facts
    for ours, theirs in ((opened.train, corpus.train), (opened.validation, corpus.validation)):
        assert [shard.read_bytes() for shard in ours.shards] == [shard.read_bytes() for shard in theirs.shards]
    assert opened.tokenizer.get_vocab() == corpus.tokenizer.get_vocab()


def stop_after(monkeypatch, pieces, error=KeyboardInterrupt):
    """Raises an error in place of a piece."""
    real, count = preparation.Preparation._add, []

    def add(self, *args):
        count.append(1)
        if len(count) > pieces:
            raise error
        real(self, *args)

    monkeypatch.setattr(preparation.Preparation, "_add", add)


def kill_after_commit(monkeypatch, commits):
    """What is on the disk after so many states stays there, as after a kill."""
    real, count = preparation.Preparation._commit, []

    def commit(self):
        if len(count) >= commits:
            raise KeyboardInterrupt
        real(self)
        count.append(1)
        if len(count) == commits:
            raise KeyboardInterrupt

    monkeypatch.setattr(preparation.Preparation, "_commit", commit)


# the tokens of `prepare`


@pytest.mark.parametrize(
    "changes", [{}, {"max_bytes": 9_000}, {"validation_fraction": 1e-9}, {"validation": True}], ids=lambda c: str([*c])
)
def test_the_tokens_are_those_of_prepare_also_after_a_stop_at_any_piece(source, tmp_path, monkeypatch, changes):
    """A fraction of 1e-9 holds a document back to the end."""
    held_out = [write_jsonl(tmp_path / "held.jsonl", HELD_OUT)] if changes.pop("validation", False) else []
    corpus = build(
        tmp_path, [str(source)], **{"validation_fraction": 0.1, "shard_bytes": 5_000, "validation": held_out} | changes
    )
    whole = prepared(source, tmp_path / "whole", held_out, **changes)
    assert_same(tmp_path / "whole", corpus)
    stops = 0
    while True:
        with monkeypatch.context() as patch:
            stop_after(patch, 1 + stops % 2)
            try:
                found = prepared(source, tmp_path / "out", held_out, **changes)
                break
            except KeyboardInterrupt:
                stops += 1
    assert stops > 1
    assert found.tokens == whole.tokens
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("blank", [False, True], ids=["", "a blank file last"])
def test_a_document_that_is_held_back_to_the_end_is_written_once_wherever_a_kill_comes(tmp_path, monkeypatch, blank):
    """Each text is a piece of its own, and the one that is held back comes after the last."""
    texts = tmp_path / "texts"
    write_jsonl(texts / "a.jsonl", texts_of(3))
    if blank:
        (texts / "1.jsonl").write_text("\n\n")
        assert find_sources([str(texts)]).files[-1].path.name == "1.jsonl"  # it is read last
    changes = {"validation_fraction": 1e-9, "vocab_size": 257}
    monkeypatch.setattr(preparation, "PIECE_DOCUMENTS", 1)
    prepared(texts, tmp_path / "whole", **changes)
    for commits in (1, 2, 3):
        with monkeypatch.context() as patch:
            kill_after_commit(patch, commits)
            with pytest.raises(KeyboardInterrupt):
                prepared(texts, tmp_path / str(commits), **changes)
        prepared(texts, tmp_path / str(commits), **changes)
        assert files_of(tmp_path / str(commits)) == files_of(tmp_path / "whole")


def test_the_tails_of_a_few_files_are_held_out_as_prepare_does(tmp_path, monkeypatch):
    for number, text in enumerate(texts_of(6, lines=200)):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    corpus = expected(tmp_path / "texts", tmp_path)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            prepared(tmp_path / "texts", tmp_path / "out")
    prepared(tmp_path / "texts", tmp_path / "out")
    assert corpus.info["validation"] == "tails of the documents"
    assert_same(tmp_path / "out", corpus)


def test_the_tokens_do_not_depend_on_the_workers_or_the_size_of_shards(source, tmp_path):
    corpus = expected(source, tmp_path)
    prepared(source, tmp_path / "three", workers=3)
    assert_same(tmp_path / "three", corpus)
    one = prepared(source, tmp_path / "one", shard_bytes=10**9).tokens
    assert one.info.data_hash == corpus.facts.data_hash
    assert one.shards == {"train": ["train-00000.bin"], "validation": ["validation-00000.bin"]}


def test_a_given_tokenizer_makes_the_tokens_of_prepare_in_its_width(source, tmp_path):
    expected(source, tmp_path).tokenizer.save_pretrained(tmp_path / "large")
    file = tmp_path / "large" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] |= {f"word {number}": number for number in range(300, 2**16 + 1)}
    file.write_text(json.dumps(content))
    corpus = expected(source, tmp_path, tokenizer=str(tmp_path / "large"))
    tokens = prepared(source, tmp_path / "out", tokenizer=str(tmp_path / "large")).tokens
    assert tokens.dtype == "<u4"
    assert_same(tmp_path / "out", corpus)


def kill_when(out, source, reached):
    """Prepares in a process of its own, which is killed when `reached` says so of its state."""

    def work():
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a fork has none of the tokenizer's threads
        real = preparation.Preparation._add

        def add(self, *args):
            real(self, *args)
            if reached(self):
                os.kill(os.getpid(), signal.SIGKILL)

        preparation.Preparation._add = add
        prepared(source, out)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return process.exitcode


def test_a_process_that_is_killed_between_the_tokens_and_their_state_loses_nothing(source, tmp_path):
    corpus = expected(source, tmp_path)
    for limit in (2_000, 4_000, 7_000):  # tokens that no state counts yet
        code = kill_when(tmp_path / "out", source, lambda build, limit=limit: build.writers["train"].tokens > limit)
        assert code == -signal.SIGKILL
        assert (tmp_path / "out" / ".preparing.json").exists()
    prepared(source, tmp_path / "out")
    assert_same(tmp_path / "out", corpus)


@pytest.mark.parametrize(
    "left", [[".preparing.json.7.part"], [".preparing.json"], [".preparing.json", "source.json.7.part"]]
)
def test_a_process_that_is_killed_before_it_said_what_it_makes_is_no_obstacle(source, finished, tmp_path, left):
    (tmp_path / "out").mkdir()
    for name in left:
        (tmp_path / "out" / name).write_text("{}" if name.endswith("json") else "{")
    prepared(source, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(finished)


def test_what_a_kill_left_in_place_of_the_state_is_removed_at_the_end(begun):
    copy, out = begun
    for name in ("meta.json.7.part", ".preparing.json.7.part"):
        (out / name).write_text("{")
    tokens = prepared(copy, out).tokens
    assert set(files_of(out)) == {"meta.json", *tokens.sizes}


# a data set on the hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A data set of three shards; what was asked for, and how many rows were read of each shard."""
    texts = texts_of(60)
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", texts[20 * n : 20 * n + 20]) for n in range(3)]
    real, asked = datasets.load_dataset, []

    def load_dataset(name, config, *, split, streaming, revision=None):
        asked.append((name, config, split, streaming, revision))
        return real("json", data_files=paths, split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_hub_data_set_goes_on_at_its_first_commit_within_the_shard_that_was_begun(hub, tmp_path, monkeypatch):
    corpus = expected("owner/name:part", tmp_path)
    read = []
    real = datasets.IterableDataset.shard
    monkeypatch.setattr(
        datasets.IterableDataset, "shard", lambda self, count, index: read.append(index) or real(self, count, index)
    )
    for pieces in (3, 1):
        with monkeypatch.context() as patch:
            stop_after(patch, pieces)
            with pytest.raises(KeyboardInterrupt):
                prepared("owner/name:part", tmp_path / "out")
        monkeypatch.setattr(token_folder, "hub_revision", lambda name: pytest.fail("the hub was asked again"))
    read.clear()
    prepared("owner/name:part", tmp_path / "out")
    assert_same(tmp_path / "out", corpus)
    assert 0 not in read
    assert {call[-1] for call in hub[1:]} == {"c0ffee"}
    assert json.loads((tmp_path / "out" / "source.json").read_text())["hub"] == [["owner/name", "part", "c0ffee"]]


def test_a_hub_data_set_with_another_text_where_it_was_left_is_refused(hub, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            prepared("owner/name", tmp_path / "out")
    for path in tmp_path.glob("*.jsonl"):
        write_jsonl(path, [text + "more" for text in texts_of(20)])
    with pytest.raises(SettingError, match=r"data holds 'owner/name', in which text \d+ isn't the one that was there"):
        prepared("owner/name", tmp_path / "out")


def test_a_source_that_does_not_tell_its_size_has_an_estimate_by_the_byte(hub, tmp_path):
    said = []
    prepare_folder(["owner/name"], tmp_path / "out", settings(), progress=False, say=said.append)
    assert "isn't known" in said[0]
    assert "for each GB of text, by an estimate" in said[0]


# the disk


@pytest.mark.parametrize("ending", [".txt", ".jsonl.zst", ".txt.xz", ".parquet"])
def test_the_estimate_of_the_disk_is_near_what_is_written(tmp_path, monkeypatch, ending):
    monkeypatch.setattr("query_experts.data.estimate.SAMPLE_BYTES", 30_000)
    random = np.random.default_rng(0)
    texts = [" ".join(map(str, random.integers(10**9, size=20))) + "\n" for _ in range(300)]
    if ending.startswith(".txt"):
        content = "".join(texts).encode()
    elif ending == ".parquet":
        content = table_bytes(texts, tmp_path)
    else:
        content = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()
    path = tmp_path / f"x{ending}"
    path.write_bytes(COMPRESS[path.suffix if path.suffix in COMPRESS else ""](content))
    said = []
    made = prepare_folder([str(path)], tmp_path / "out", settings(), progress=False, say=said.append).tokens
    tokens = made.info.train_tokens + made.info.validation_tokens
    told = float(said[0].split("estimate: ")[1].split("k tokens")[0]) * 1000
    assert told == pytest.approx(tokens, rel=0.1)


def test_a_disk_without_room_is_refused_before_anything_is_tokenised(source, tmp_path, monkeypatch, refused):
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr(preparation.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(preparation, "save_tokenizer", lambda tokenizer, folder: tokenizer.save_pretrained(folder))
    argv = ["data", "prepare", source, "--out", tmp_path / "out", "--vocab_size", "300", "--workers", "1"]
    refused(argv, "out is", "whose disk has 10.0 kB free; it needs about", "by an estimate: free that much")
    assert not [*(tmp_path / "out").glob("*.bin")]


def test_a_disk_that_may_suffice_as_the_estimate_counts_duplicates_is_warned_of(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "x.jsonl", texts_of(5) * 12)
    said = []
    real = shutil.disk_usage
    monkeypatch.setattr(preparation, "save_tokenizer", lambda tokenizer, folder: tokenizer.save_pretrained(folder))
    monkeypatch.setattr(preparation, "estimate", lambda *_: Estimate(9_000, 6_000, 60, 9_000))
    monkeypatch.setattr(preparation.shutil, "disk_usage", lambda folder: real(folder)._replace(free=7_000))
    prepare_folder([path], tmp_path / "out", settings(), progress=False, say=said.append)
    assert "Warning: 13.0 kB are needed by that estimate, and 7.00 kB are free. Duplicates" in said[1]
    monkeypatch.setattr(preparation.shutil, "disk_usage", lambda folder: real(folder)._replace(free=6_400))
    with pytest.raises(SettingError, match=r"has 6.40 kB free; it needs about 13.0 kB"):
        prepare_folder([path], tmp_path / "other", settings(), progress=False)


def test_a_disk_that_fills_up_keeps_what_is_finished(source, tmp_path, monkeypatch):
    corpus = expected(source, tmp_path)
    real, calls = ShardWriter.append, []

    def append(self, ids):
        calls.append(1)
        if len(calls) > 5:
            real(self, ids[: len(ids) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, ids)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", append)
        with pytest.raises(SettingError, match=r"out is .*, whose disk is full: .* and the same command goes on"):
            prepared(source, tmp_path / "out")
    state = json.loads((tmp_path / "out" / ".preparing.json").read_text())
    assert state["splits"]["train"]["tokens"] > 0
    prepared(source, tmp_path / "out")
    assert_same(tmp_path / "out", corpus)


# what has changed


@pytest.fixture
def begun(source, tmp_path, monkeypatch):
    """A folder that was begun, and its source, which may be changed."""
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            prepared(copy, tmp_path / "out")
    return copy, tmp_path / "out"


def test_a_changed_setting_is_refused_with_what_it_was_and_is(begun):
    copy, out = begun
    with pytest.raises(SettingError, match=r"begun with another source .* \(max_bytes was None, now 9\)"):
        prepared(copy, out, max_bytes=9)
    with pytest.raises(SettingError, match="tokenizer was None, now 'gpt2'"):
        prepared(copy, out, tokenizer="gpt2")


def test_what_fails_before_the_first_tokens_leaves_nothing_that_binds(source, tmp_path, refused):
    (tmp_path / "blank.txt").write_text("  \n")
    (tmp_path / "mine").mkdir()
    argv = ["data", "prepare", "--out", tmp_path / "out", "--workers", "1", "--vocab_size", "300"]
    refused([*argv, source, "--text_field", "body"], "has no 'body' among its")
    refused([*argv, source, "--tokenizer", tmp_path / "mine"], "mine', a folder that holds none")
    refused([*argv, tmp_path / "blank.txt"], "in which there is no text")
    assert not (tmp_path / "out").exists()


def test_a_changed_file_is_refused_with_its_size_and_time(begun):
    copy, out = begun
    os.utime(copy / "d.txt", ns=(0, 0))
    with pytest.raises(
        SettingError, match=r"file 'd.txt' was (\d+) bytes of [-\d]+ [.:\d]+, now \1 bytes of 1970-01-01"
    ):
        prepared(copy, out)
    (copy / "d.txt").unlink()
    (copy / "e.txt").write_text("new")
    with pytest.raises(SettingError, match=r"file 'd.txt' was .*, now not there; file 'e.txt' was not there"):
        prepared(copy, out)


def test_a_tokenizer_folder_with_other_content_is_refused(source, tmp_path, monkeypatch):
    tokenizer = expected(source, tmp_path).tokenizer
    tokenizer.save_pretrained(tmp_path / "mine")
    stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        prepared(source, tmp_path / "out", tokenizer=str(tmp_path / "mine"))
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(tmp_path / "mine")
    with pytest.raises(SettingError, match=r"the content of tokenizer '.*mine' had the hash [0-9a-f]{12}, now "):
        prepared(source, tmp_path / "out", tokenizer=str(tmp_path / "mine"))


def test_shards_that_lost_or_changed_tokens_since_are_refused(begun):
    copy, out = begun
    path = out / "train-00000.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    with pytest.raises(SettingError, match=r"whose train-00000.bin is missing or was cut; remove the folder"):
        prepared(copy, out)
    path.write_bytes(content[:-2] + b"\0\0")
    with pytest.raises(SettingError, match=r"train-00000.bin .*holds other tokens than written"):
        prepared(copy, out)


def test_a_document_that_is_held_out_too_is_refused_when_it_is_read(tmp_path, monkeypatch):
    texts = texts_of(60)
    held_out = write_jsonl(tmp_path / "held.jsonl", [*HELD_OUT, texts[3]])
    stop_after(monkeypatch, 3, AssertionError("tokenised on"))
    with pytest.raises(SettingError, match=r"held.jsonl', which shares 1 document with data"):
        prepared(write_jsonl(tmp_path / "x.jsonl", texts), tmp_path / "out", [held_out])


# a finished folder


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    prepare_folder([str(source)], out, settings(), progress=False)
    return out


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "tokens"))


def test_a_finished_folder_is_recognised_and_nothing_is_done_again(finished, source, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    monkeypatch.setattr(preparation.Preparation, "run", lambda self: pytest.fail("done again"))
    assert prepared(source, finished).seconds is None
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}.items() <= before.items()
    with pytest.raises(SettingError, match="max_bytes was None, now 9"):
        prepared(source, finished, max_bytes=9)


def test_check_names_damaged_and_missing_files(copied):
    assert check_folder(copied, progress=False) == read_meta(copied)
    content = bytearray((copied / "train-00001.bin").read_bytes())
    content[7] ^= 1
    (copied / "train-00001.bin").write_bytes(content)
    with pytest.raises(SettingError, match=r"in which train-00001.bin is damaged \(its SHA-256 isn't that"):
        check_folder(copied, progress=False)
    (copied / "train-00000.bin").unlink()
    with pytest.raises(SettingError, match=r"in which train-00000.bin is missing or cut"):
        check_folder(copied, progress=False)


def test_a_folder_without_checksums_is_read_and_checked_by_the_hash_of_all_tokens(copied):
    meta = json.loads((copied / "meta.json").read_text())
    del meta["sha256"]
    (copied / "meta.json").write_text(json.dumps(meta))
    assert check_folder(copied, progress=False).sha256 == {}
    (copied / "train-00001.bin").write_bytes(bytes((copied / "train-00001.bin").stat().st_size))
    with pytest.raises(SettingError, match="a shard is damaged"):
        check_folder(copied, progress=False)


def test_a_part_of_the_tokens_is_not_taken_for_what_data_prepare_made(copied, source, tmp_path):
    write_portion(copied, tmp_path / "part", None, 5_000)
    with pytest.raises(SettingError, match="holds tokens that data prepare didn't make"):
        prepared(source, tmp_path / "part")


def test_training_refuses_a_folder_that_is_unfinished_or_lacks_a_shard(begun, copied):
    with pytest.raises(SettingError, match="which query-experts data prepare hasn't finished"):
        prepare([str(begun[1])], cache_dir=begun[1], seq_len=8)
    (copied / "train-00001.bin").unlink()
    with pytest.raises(SettingError, match=r"lacks 1 file of tokens or holds a part of it, such as train-00001.bin"):
        prepare([str(copied)], cache_dir=copied, seq_len=8)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_step_reads_the_same_rows_whatever_the_number_of_ranks(finished, workers):
    train = prepare([str(finished)], cache_dir=finished, seq_len=8).train

    def steps(ranks):
        """The rows of each step of eight sequences, over all ranks, by the loader that the Trainer makes."""
        found = []
        for rank in range(ranks):
            shuffled = RandomSampler(train, generator=torch.Generator().manual_seed(3))
            loader = prepare_data_loader(
                DataLoader(train, 8 // ranks, sampler=shuffled, num_workers=workers, drop_last=True),
                num_processes=ranks, process_index=rank, use_seedable_sampler=True, data_seed=3,
            )  # fmt: skip
            found.append([{tuple(row) for row in batch["input_ids"].tolist()} for batch in loader])
        return [set().union(*step) for step in zip(*found, strict=True)]

    one = steps(1)
    assert len(one) > 20
    assert all(rows != following for rows, following in pairwise(one))
    for ranks in (2, 4) if workers == 0 else (2,):
        assert steps(ranks) == one


# the command


def test_the_command_prepares_prints_what_it_made_and_checks_it(source, tmp_path, capsys):
    argv = ["data", "prepare", str(source), "--out", str(tmp_path / "T"), "--vocab_size", "300", "--workers", "1"]
    assert main(argv) == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in ("an estimate", "are free", "7 exact duplicates dropped", "uint16", "data_hash", "--data"):
        assert words in out
    assert main(argv) == 0
    assert "holds these tokens already" in " ".join(capsys.readouterr().out.split())
    assert main(["data", "check", str(tmp_path / "T")]) == 0
    assert "all as written" in capsys.readouterr().out


def test_ctrl_c_says_that_the_same_command_goes_on(source, tmp_path, capsys, monkeypatch):
    stop_after(monkeypatch, 2)
    assert main(["data", "prepare", str(source), "--out", str(tmp_path / "T"), "--workers", "1"]) == 130
    assert "stopped; the same command goes on from the last finished piece" in capsys.readouterr().err
    assert json.loads((tmp_path / "T" / ".preparing.json").read_text())["splits"]["train"]["tokens"] > 0


def test_what_the_command_cannot_use_is_named(source, finished, tmp_path, refused):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    prepare_into = ["data", "prepare", source, "--out"]
    refused(["data", "prepare", source], "out isn't given; it must be a folder")
    refused(["data", "prepare", "--out", out], "data")
    refused(["data", "make", source], "action is 'make'; it must be prepare or check")
    refused(["data", "prepare", tmp_path / "no.txt", "--out", out], "no.txt', which doesn't exist")
    refused(["data", "prepare", tmp_path / "empty", "--out", out], "empty', a folder without a file that can be read")
    refused(["data", "prepare", finished, "--out", out], "which is a folder of tokens already; it must be text")
    refused([*prepare_into, tmp_path / "file"], "file, which is a file; it must be a folder")
    refused([*prepare_into, tmp_path / "file" / "below"], "where the tokens can't be written (Not a directory)")
    refused([*prepare_into, source], "which holds other files; it must be a new or empty folder")
    refused([*prepare_into, out, "--workers", "0"], "workers is 0; it must be 1 or more")
    refused([*prepare_into, out, "--vocab_size", "9"], "vocab_size is 9; it must be 257 or more")
    refused(["data", "check", source], "it must be a folder of tokens")
    refused(["data", "check", finished, source], "for data check it must be one folder of tokens")
    refused(["data", "check", finished, "--workers", "2"], "workers is 2, which belongs to data prepare")
    assert not out.exists()


def test_a_launch_of_several_processes_is_refused(source, finished, tmp_path, refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for argv in (["data", "prepare", source, "--out", tmp_path / "out"], ["data", "check", finished]):
        refused(argv, f"WORLD_SIZE is 2; {' '.join(argv[:2])} works in one process")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "names", [["source.json", "a.bin"], ["mine.part"], ["meta.json", "source.json", "a.bin"], ["x"]]
)
def test_nothing_is_removed_from_a_folder_of_another_kind(source, tmp_path, names):
    (tmp_path / "out").mkdir()
    for name in names:
        (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(SettingError, match=r"out (is|holds) .* it must be a new or empty folder"):
        prepared(source, tmp_path / "out")
    assert sorted(files_of(tmp_path / "out")) == sorted(names)


def test_a_folder_at_which_another_process_works_is_refused(source, tmp_path):
    with (
        token_folder.own_folder(tmp_path / "out"),
        pytest.raises(SettingError, match="in which another process is at work"),
    ):
        prepared(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_worker_that_dies_ends_the_command_and_nothing_is_lost(source, tmp_path, monkeypatch):
    corpus = expected(source, tmp_path)
    real, count = preparation.Preparation._add, []

    def add(self, *args):
        real(self, *args)
        count.append(1)
        if len(count) == 3:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(preparation.Preparation, "_add", add)
        with pytest.raises(SettingError, match=r"workers is 2, of which one has died \(exit status -9;"):
            prepared(source, tmp_path / "out", workers=2)
    assert not multiprocessing.active_children()
    prepared(source, tmp_path / "out", workers=2)
    assert_same(tmp_path / "out", corpus)


@pytest.mark.parametrize(("sizes", "most"), [([4] * 12, 13), ([3, 100, 100, 2, 2], 103)])
def test_the_pieces_that_are_read_ahead_have_so_many_characters_and_one_piece_beyond(sizes, most, monkeypatch):
    monkeypatch.setattr(workers, "_AHEAD_CHARACTERS", 5)
    running = workers._Workers(workers.Encoding("", 0, "<u2"), 2)
    others = dict(multiprocessing.Pipe() for _ in range(2))  # each answers at once
    running._processes = dict.fromkeys(others)
    monkeypatch.setattr(running, "_send", lambda connection, documents: others[connection].send({}))
    held, highest = 0, []

    def pieces():
        nonlocal held
        for size in sizes:
            held += size
            highest.append(held)
            yield workers.Piece([("train", "x" * size, size)], {}, b"")

    found = []
    for piece, _ in running.encode(pieces()):
        found.append(piece.characters)
        held -= piece.characters
    assert found == sizes
    assert max(highest) <= most
    assert held == 0


def test_digests_are_a_set_of_any_size():
    digests, known = Digests(), set()
    random = np.random.default_rng(0)
    for digest in (random.bytes(16) for _ in range(5_000)):
        assert digest not in digests
        assert digests.add(digest)
        known.add(digest)
    assert not any(digests.add(digest) for digest in known)
    assert len(digests) == len(known) == 5_000
    assert random.bytes(16) not in digests
