"""Files are written completely or not at all; the check of free space; disk errors as OSError."""

import errno
import json
import math
import os
import shutil
from collections import namedtuple
from tempfile import TemporaryFile
from traceback import StackSummary

import pytest
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from query_experts.common import files
from query_experts.common.errors import SettingError
from query_experts.common.files import (
    disk_errors_as_os_errors,
    parse_json,
    read_json,
    require_space,
    require_writable,
    write_json,
    write_text,
)


def test_json_is_written_whole_with_its_folder_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a" / "b" / "result.json"
    write_json(path, {"loss": 1.5, "name": "東京"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"loss": 1.5, "name": "東京"}
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_a_name_that_is_not_utf8_is_no_reason_to_write_nothing(tmp_path):
    write_text(tmp_path / "page.html", "data: caf\udce9.txt, 東京")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "data: caf?.txt, 東京"
    write_json(tmp_path / "x.json", "caf\udce9.txt")
    assert json.loads((tmp_path / "x.json").read_bytes()) == "caf\udce9.txt"


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    calls = []
    real, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: calls.append(os.fstat(number).st_size) or real(number))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    write_text(tmp_path / "state", "12345")
    assert calls == [5, "replace"]


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json(path, [1])

    def no_room(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", no_room)
    with pytest.raises(OSError, match="No space"):
        write_json(path, [2])
    assert json.loads(path.read_text()) == [1]


@pytest.mark.parametrize("value", [math.nan, math.inf, object()])
def test_what_json_cannot_hold_is_refused_and_the_file_stays(tmp_path, value):
    path = tmp_path / "result.json"
    write_json(path, [1])
    with pytest.raises((ValueError, TypeError)):
        write_json(path, {"loss": value})
    assert json.loads(path.read_text()) == [1]


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": 1',
        b"\xff",
        "{}".encode("utf-16"),
        b"\xef\xbb\xbf{}",
        b"",
    ],
    ids=lambda content: str(content[:9]),
)
def test_a_file_that_is_no_json_is_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"."):
        parse_json((tmp_path / "x.json").read_text(encoding="utf-8"))
    with pytest.raises(SettingError, match=r"out holds .*x\.json, which is damaged .*; remove it"):
        read_json(tmp_path / "x.json", "remove it")


def test_too_little_room_is_refused_with_what_there_is_and_what_is_needed(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - 3 * 10**6, 3 * 10**6))
    require_space(tmp_path / "new", 3 * 10**6)
    assert (tmp_path / "new").is_dir()
    with pytest.raises(SettingError, match=r"out is .*run, whose disk has 3.0 MB free; it needs about 40.0 MB"):
        require_space(tmp_path / "run", 40 * 10**6)


def test_a_folder_that_another_process_removes_after_its_own_check_is_tried_again(tmp_path, monkeypatch):
    calls = []

    def file_in(dir):
        calls.append(dir)
        if len(calls) < 3:
            dir.rmdir()
        return TemporaryFile(dir=dir)

    monkeypatch.setattr(files, "TemporaryFile", file_in)
    require_writable(tmp_path / "new" / "out")
    assert len(calls) == 3
    assert [*tmp_path.iterdir()] == []
    monkeypatch.setattr(files, "TRIES", 0)
    calls.clear()
    with pytest.raises(SettingError, match="which can't be written to"):
        require_writable(tmp_path / "out")


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (SafetensorError("I/O error: File too large (os error 27)"), errno.EFBIG),
        (SafetensorError("I/O error: Disk quota exceeded (os error 122)"), errno.EDQUOT),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), errno.ENOSPC),
    ],
)
def test_a_disk_that_refuses_is_told_by_its_number_and_folder(tmp_path, error, number):
    with pytest.raises(OSError, match=os.strerror(number)) as raised, disk_errors_as_os_errors(tmp_path):
        raise error
    assert (raised.value.errno, raised.value.filename) == (number, str(tmp_path))


def test_other_errors_stay_what_they_are(tmp_path):
    for inner in (OSError(errno.ENOSPC, "full"), RuntimeError("unexpected pos 5 vs 1")):
        failure = CheckpointException("save", {1: (inner, StackSummary())})
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)), disk_errors_as_os_errors(tmp_path):
            raise failure
    with pytest.raises(RuntimeError, match=r"^ValueError: other$"), disk_errors_as_os_errors(tmp_path):
        raise CheckpointException("load", {0: (ValueError("other"), StackSummary())})
    for ends in (KeyboardInterrupt, SystemExit):
        with pytest.raises(ends), disk_errors_as_os_errors(tmp_path):
            raise ends
    with pytest.raises(SafetensorError, match="header"), disk_errors_as_os_errors(tmp_path):
        raise SafetensorError("invalid header")
