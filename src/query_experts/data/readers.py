"""Reads documents from each format and compression; errors name the file and the place in it."""

import errno
import gzip
import io
import json
import logging
import lzma
import math
import shutil
import tempfile
import tokenize
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from query_experts.common.checkpoints import missing_on_hub
from query_experts.common.errors import SettingError

FORMATS = (".txt", ".md", ".py", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".xz", ".zst")
_CHUNK = 1 << 18
_SMALL_CHUNK = 1 << 10
_DECOMPRESSED_HEAD = 1 << 22
_PARQUET_ROWS = 1000


_REPEATED = object()  # stands for the values of a name that several fields of an object have


def _object(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(fields)
    if len(row) < len(fields):
        row |= {name: _REPEATED for name, count in Counter(name for name, _ in fields).items() if count > 1}
    return row


# text has no numbers, and Python's may not be of any length
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=lambda digits: 0)


def format_of(path: Path) -> str | None:
    """The format by the file's name, without the ending of a compression; None if it isn't one of `FORMATS`."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    suffix = Path(name).suffix
    return suffix if suffix in FORMATS else None


def name_without_endings(path: Path) -> str:
    """The file's name without the endings of its format and compression."""
    name = path.name
    for endings in (COMPRESSIONS, FORMATS):
        name = next((name[: -len(ending)] for ending in endings if name.lower().endswith(ending)), name)
    return name


def holds_plain_text(path: Path) -> bool:
    """Whether the file's size is about the size of its text: neither compressed nor parquet."""
    return path.suffix.lower() not in (*COMPRESSIONS, ".parquet")


def is_one_document(path: Path) -> bool:
    """Whether the whole file is one document, rather than each of its lines or rows."""
    return format_of(path) not in (".jsonl", ".parquet")


def read_file(path: Path, text_field: str, scratch: Path) -> Iterator[str]:
    """The documents of one file: a whole text file, each line of jsonl, or each row of parquet.

    A null field is an empty document. scratch: folder for a decompressed parquet file. Raises SettingError for text
    that is not UTF-8, a line that is not a JSON object with the field once, a table without the column, and a file that
    is cut short or damaged.
    """
    with _errors_as_setting_errors(path), path.open("rb") as file, _plain(path, file) as stream:
        match format_of(path):
            case ".jsonl":
                yield from _jsonl(path, stream, text_field)
            case ".parquet":
                yield from _parquet(path, stream, text_field, scratch)
            case _:
                yield _decode(path, stream.read(), 0)


class Head(NamedTuple):
    """Texts from the start of a file, and how many times as much text, roughly, the whole file holds."""

    texts: list[str]
    times: float


def read_head(path: Path, text_field: str, size: int) -> Head | None:
    """Texts from the start of a file, of `size` UTF-8 bytes or little more. A file of one document is cut there.

    Of a compressed file 4 MB of text are read, since it is decompressed in large blocks. None for a compressed parquet
    file, whose rows can't be counted without reading all of it. Raises SettingError as `read_file`.
    """
    with _errors_as_setting_errors(path), path.open("rb") as file:
        if format_of(path) == ".parquet":
            return None if path.suffix.lower() in COMPRESSIONS else _parquet_head(path, file, text_field, size)
        counted = _CountedFile(file)
        read = max(size, 0 if holds_plain_text(path) else _DECOMPRESSED_HEAD)
        with _plain(path, cast(BinaryIO, counted)) as stream:
            if format_of(path) == ".jsonl":
                texts, text_bytes = _up_to(read, size, _jsonl(path, stream, text_field))
            else:
                content = stream.read(read)
                texts, text_bytes = [content[:size].decode(errors="ignore")], len(content)
        parts = text_bytes / max(sum(len(text.encode()) for text in texts), 1)
        return Head(texts, parts * path.stat().st_size / max(counted.read_bytes, 1))


def _parquet_head(path: Path, file: BinaryIO, text_field: str, size: int) -> Head:
    texts, _ = _up_to(size, size, _parquet(path, file, text_field, path.parent))
    from pyarrow import parquet

    return Head(texts, parquet.read_metadata(path).num_rows / max(len(texts), 1))


def _up_to(read: int, kept: int, texts: Iterator[str]) -> tuple[list[str], int]:
    """The first texts, until they have `kept` UTF-8 bytes; and the bytes of those up to `read`."""
    found: list[str] = []
    size = 0
    for text in texts:
        if size < kept:
            found.append(text)
        size += len(text.encode())
        if size >= read:
            break
    return found, size


class _CountedFile(io.RawIOBase):
    """A file that is read in small steps, so that what was read is little more than what was used."""

    def __init__(self, file: BinaryIO) -> None:
        self.read_bytes = 0
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(min(len(buffer), _SMALL_CHUNK))
        self.read_bytes += len(data)
        buffer[: len(data)] = data
        return len(data)


def python_source(path: Path) -> Iterator[str]:
    """The text of a Python file, by the encoding that it declares; nothing if it can't be opened or decoded."""
    try:
        with path.open("rb") as stream:
            encoding, _ = tokenize.detect_encoding(stream.readline)
        yield path.read_bytes().decode(encoding)
    except (OSError, SyntaxError, UnicodeDecodeError):
        return


@dataclass
class HubPlace:
    """A place in a data set on the hub: the number of a shard, one of its files, and of rows read of it."""

    shard: int = 0
    row: int = 0


def read_hub(
    name: str, config: str | None, text_field: str, revision: str | None = None, place: HubPlace | None = None
) -> Iterator[str]:
    """Streams the rows of a hub data set's train split. Raises SettingError if it can't be loaded, or reading fails.

    Args:
        revision: a commit of the data set; None for its newest.
        place: where to begin, which goes along with what is read; None reads from the start. Of the shard in which it
            is, the rows before it are read again.
    """
    full_name = name if config is None else f"{name}:{config}"
    number = 0
    with _hub_errors(name, config, lambda: number):
        rows = open_hub(name, config, revision)
        for row in rows if place is None else _rows_from(rows, place):
            number += 1
            yield _text_of(row, text_field, f"{full_name!r}, where row {number}", "columns")


def open_hub(name: str, config: str | None, revision: str | None = None) -> Any:
    """The train split of a hub data set, as a stream of rows."""
    from datasets import load_dataset

    pinned = {} if revision is None else {"revision": revision}
    with _quiet("datasets", "huggingface_hub"):
        return load_dataset(name, config, split="train", streaming=True, **pinned)


def hub_head(name: str, config: str | None, text_field: str, revision: str | None, size: int) -> Head:
    """The first texts of a hub data set, as `read_head` gives them; NaN times where its card has no number of rows."""
    texts, _ = _up_to(size, size, read_hub(name, config, text_field, revision))
    with _hub_errors(name, config, lambda: 0):
        split = (open_hub(name, config, revision).info.splits or {}).get("train")
    return Head(texts, split.num_examples / max(len(texts), 1) if split else math.nan)


def hub_revision(name: str) -> str | None:
    """The commit that a hub data set has now; None where the hub isn't asked, as in offline mode."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        return HfApi().dataset_info(name).sha
    except OfflineModeIsEnabled:
        return None
    except Exception as error:  # the HTTP client's; which client it is depends on the hub package's version
        raise SettingError(
            f"data holds {name!r}, which is no file or folder here, and whose revision the hub doesn't tell "
            f"({_one_line(error)})"
        ) from error


def _rows_from(rows: Any, place: HubPlace) -> Iterator[Any]:
    """The rows from a place on, shard by shard: their order is that of the whole stream."""
    for shard in range(place.shard, rows.num_shards):
        begin = place.row if shard == place.shard else 0
        place.shard, place.row = shard, begin
        for row in islice(rows.shard(rows.num_shards, shard), begin, None):
            place.row += 1
            yield row


@contextmanager
def _hub_errors(name: str, config: str | None, rows_read: Callable[[], int]) -> Iterator[None]:
    """Raises SettingError for what goes wrong with a hub data set. rows_read: tells how many rows were read before."""
    full_name = name if config is None else f"{name}:{config}"
    try:
        import datasets.exceptions
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise SettingError(
            _needs_package(f"{full_name!r}, no file or folder but the name of a data set", "datasets")
        ) from error
    # the hub's error derives from the error of the HTTP client that its version uses: any error of that client counts
    failures = (*HfHubHTTPError.__bases__, OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
    if (why := missing_on_hub(name, "dataset")) is not None:
        raise SettingError(f"data holds {full_name!r}, which is no file or folder here, and {why}")
    try:
        yield
    except SettingError:
        raise
    except failures as error:
        if number := rows_read():
            raise SettingError(
                f"data holds {full_name!r}, which can't be read past row {number} ({_one_line(error)}); "
                "try again, or lower max_bytes"
            ) from error
        raise SettingError(
            f"data holds {full_name!r}, which is no file or folder here, and no data set with a train split that "
            f"the Hugging Face hub could load ({_one_line(error)})"
        ) from error


@contextmanager
def _quiet(*packages: str) -> Iterator[None]:
    """Silence the warnings of these packages, such as a line for each attempt to reach the hub."""
    loggers = [logging.getLogger(package) for package in packages]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _needs_package(name: str, package: str) -> str:
    """The error sentence for an absent package."""
    return (
        f"data holds {name}, which needs the package {package}; "
        "install it with `pip install query-experts[data]` or name another source"
    )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."


@contextmanager
def _errors_as_setting_errors(path: Path) -> Iterator[None]:
    """Raises SettingError, naming the file, for read and decompression errors; a full disk stays an OSError."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise SettingError(
            f"data holds {str(path)!r}, which is damaged, cut short or closed to this user ({_one_line(error)}); "
            "a file must be readable to its end"
        ) from error


def _plain(path: Path, file: BinaryIO) -> BinaryIO:
    """The content of a file, by the ending of its name."""
    match path.suffix.lower():
        case ".gz":
            return cast(BinaryIO, gzip.GzipFile(fileobj=file, mode="rb"))
        case ".xz":
            return cast(BinaryIO, lzma.LZMAFile(file))
        case ".zst":
            return cast(BinaryIO, io.BufferedReader(_ZstdReader(path, file), _CHUNK))
        case _:
            return io.BufferedReader(file, _SMALL_CHUNK) if isinstance(file, _CountedFile) else file


class _ZstdReader(io.RawIOBase):
    """Decompresses the frames of a .zst file. Unlike zstandard's reader it raises EOFError for a frame cut short."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise SettingError(_needs_package(repr(str(path)), "zstandard")) from error
        self._error = zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._text = memoryview(b"")
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            finished = self._frame is None or self._frame.eof
            data = (self._frame.unused_data if self._frame and finished else b"") or self._file.read(_CHUNK)
            if not data:
                if finished:
                    return 0
                raise EOFError("the last frame is cut short")
            if finished:
                self._frame = self._new_frame()
            try:
                self._text = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise OSError(str(error)) from error
        size = min(len(buffer), len(self._text))
        buffer[:size] = self._text[:size]
        self._text = self._text[size:]
        return size

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _decode(path: Path, encoded: bytes, offset: int) -> str:
    """Decode UTF-8. offset: position of these bytes in the file; a byte order mark at the file's start is dropped."""
    try:
        text = encoded.decode()
    except UnicodeDecodeError as error:
        raise SettingError(
            f"data holds {str(path)!r}, which is not UTF-8 at byte {offset + error.start} ({error.reason}); "
            "text must be UTF-8"
        ) from error
    return text if offset else text.removeprefix("\ufeff")


def _jsonl(path: Path, stream: BinaryIO, text_field: str) -> Iterator[str]:
    offset = 0
    for number, encoded in enumerate(stream, 1):
        line = _decode(path, encoded, offset)
        offset += len(encoded)
        if not line.strip():
            continue
        where = f"{str(path)!r}, where line {number}"
        try:
            row = _DECODER.decode(line)
        except (json.JSONDecodeError, RecursionError) as error:
            why = (
                f"{error.msg.removesuffix(' at')} at column {error.colno}"
                if isinstance(error, ValueError)
                else "nested too deeply"
            )
            raise SettingError(
                f"data holds {where} is not JSON ({why}); each line must be a JSON object with the field {text_field!r}"
            ) from error
        if not isinstance(row, dict):
            raise SettingError(
                f"data holds {where} is a JSON {type(row).__name__}; "
                f"each line must be a JSON object with the field {text_field!r}"
            )
        if row.get(text_field) is _REPEATED:
            raise SettingError(f"data holds {where} has {text_field!r} more than once; it must have one text")
        yield _text_of(row, text_field, where, "fields")


@contextmanager
def _seekable(path: Path, stream: BinaryIO, scratch: Path) -> Iterator[BinaryIO]:
    """A parquet file is read from its end, so a compressed one is decompressed into `scratch` first."""
    if path.suffix.lower() not in COMPRESSIONS:
        yield stream
        return
    with tempfile.TemporaryFile(dir=scratch) as plain:
        shutil.copyfileobj(stream, plain, _CHUNK)
        yield cast(BinaryIO, plain)


def _parquet(path: Path, stream: BinaryIO, text_field: str, scratch: Path) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise SettingError(_needs_package(repr(str(path)), "pyarrow")) from error
    number = 0
    try:
        with _seekable(path, stream, scratch) as table_file:
            table = parquet.ParquetFile(table_file)
            columns = table.schema_arrow.names
            if text_field not in columns:
                raise SettingError(_lacks_field(f"{str(path)!r}, a table that", text_field, columns, "columns"))
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield _text_of({text_field: value}, text_field, f"{str(path)!r}, where row {number}", "columns")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise SettingError(
            f"data holds {str(path)!r}, which can't be read as parquet after row {number} ({_one_line(error)}); "
            "a file must be readable to its end"
        ) from error


def _lacks_field(where: str, text_field: str, names: list[str], kind: str) -> str:
    """The error sentence for a row or table without the field."""
    return (
        f"data holds {where} has no {text_field!r} among its {kind} ({', '.join(names)}); "
        "text_field must name one of them"
    )


def _text_of(row: Mapping[str, Any], text_field: str, where: str, kind: str) -> str:
    """The text of a row; "" where the field is null. Raises SettingError for a field that is absent or isn't text."""
    if text_field not in row:
        raise SettingError(_lacks_field(where, text_field, [str(name) for name in row], kind))
    text = row[text_field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise SettingError(
            f"data holds {where} has {text_field!r} of type {type(text).__name__}; text_field must name text"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SettingError(
            f"data holds {where} has half a surrogate pair in {text_field!r} at character {error.start}; "
            "text must be valid Unicode"
        ) from error
    return text
