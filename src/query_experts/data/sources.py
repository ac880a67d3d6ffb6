"""Finds text: in files and folders, on the Hugging Face hub, or in this machine's Python standard library."""

import errno
import hashlib
import os
import platform
import re
import sys
import sysconfig
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from query_experts.common.errors import SettingError
from query_experts.data import readers
from query_experts.data.folder import read_meta

_HUB_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<config>[\w.-]+))?")
_FEW_DOCUMENTS = 50
_LINK_AROUND = "link to a folder around it"  # stands for the ending among the skipped files
_STDLIB_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"}


@dataclass(frozen=True)
class SourceFile:
    """One file to read.

    entry: the entry of `data` that led to it. name: its path below that entry. identity: its device and inode.
    """

    path: Path
    entry: str
    name: str
    size: int
    mtime_ns: int
    identity: tuple[int, int]


@dataclass(frozen=True)
class Sources:
    """Everything that `data` names, in reading order: first the files, shuffled, then the hub data sets as given.

    The shuffle sorts by a hash of the file's path below its folder, without a seed. So the text up to a byte limit is
    a sample of the folder rather than its first names in the alphabet, and the same on every machine.
    """

    names: list[str]  # the entries of `data`
    files: list[SourceFile] = field(default_factory=list)
    hub: list[tuple[str, str | None]] = field(default_factory=list)
    standard_library: bool = False
    skipped: dict[str, int] = field(default_factory=dict)  # ending of the name -> number of such files in the folders

    def fingerprint(self) -> list[object]:
        """Changes when a source changes: names, and each file's relative path, size and modification time (ns)."""
        return [self.names, [[file.entry, file.name, file.size, file.mtime_ns] for file in self.files], self.hub]

    def text_bytes(self) -> int | None:
        """Bytes of text, roughly; None where compression, parquet or a hub data set hides them."""
        if self.hub or not all(readers.holds_plain_text(file.path) for file in self.files):
            return None
        return sum(file.size for file in self.files)

    def few_documents(self, max_bytes: int | None) -> bool:
        """Whether all sources are files of one document each, and fewer than 50 begin within `max_bytes` (on disk)."""
        if self.hub or not all(readers.is_one_document(file.path) for file in self.files):
            return False
        limit = sys.maxsize if max_bytes is None else max_bytes
        starts = accumulate([0, *(file.size for file in self.files[:-1])])
        return sum(start < limit for start in starts) < _FEW_DOCUMENTS

    def texts(self, text_field: str, scratch: Path) -> Iterator[str]:
        """Each document's text. scratch: folder for a decompressed parquet file. Raises SettingError."""
        for file in self.files:
            if self.standard_library:
                yield from readers.python_source(file.path)
            else:
                yield from readers.read_file(file.path, text_field, scratch)
        for name, config in self.hub:
            yield from readers.read_hub(name, config, text_field)


def find_sources(data: Sequence[str] | None) -> Sources:
    """Resolve the `data` setting without reading text. Raises SettingError for a missing or unreadable entry.

    A file that has several names, within an entry or in several, is there once, by the first name in reading order.
    """
    if data is None:
        return _standard_library()
    entries = [data] if isinstance(data, str | os.PathLike) else list(data)
    if not entries:
        raise SettingError("data is an empty list; name at least one file, folder or hub data set, or leave it None")
    names = [os.fspath(entry) for entry in entries]
    files: list[tuple[bytes, SourceFile]] = []
    skipped: Counter[str] = Counter()
    hub: list[tuple[str, str | None]] = []
    for name in names:
        if not name:  # a shell's unset variable; Path("") would be the working directory
            raise SettingError(f"data holds {name!r}; {_ALLOWED}")
        path = Path(name).expanduser()
        if read_meta(path) is not None:
            raise SettingError(f"data holds {name!r}, which is a folder of tokens already; it must be text")
        if os.path.lexists(path):
            files += [(_shuffle_key(file.name), file) for file in _files_of(path, name, skipped)]
        elif (match := _HUB_NAME.fullmatch(name)) and readers.format_of(path) is None:
            hub.append((match["name"], match["config"]))
        else:
            raise missing(name)
    in_order = _once([file for _, file in sorted(files, key=lambda pair: pair[0])])
    return Sources(names, in_order, hub, skipped=dict(skipped.most_common()))


OR_HUB = ", or a hub data set written owner/name or owner/name:config"
_ALLOWED = (
    f"an entry is a file or folder of {' '.join(readers.FORMATS)} (each also with {' '.join(readers.COMPRESSIONS)})"
    + OR_HUB
)


def missing(entry: str) -> SettingError:
    """The error for an entry that is no file or folder."""
    return SettingError(f"data holds {entry!r}, which doesn't exist; {_ALLOWED}")


def _once(files: list[SourceFile]) -> list[SourceFile]:
    """Each file by its first name. A file system without inodes tells 0 for each, which stand for different files."""
    seen: set[tuple[int, int]] = set()
    kept = []
    for file in files:
        if file.identity not in seen:
            kept.append(file)
        if file.identity[1]:
            seen.add(file.identity)
    return kept


def _shuffle_key(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()


def _files_of(path: Path, entry: str, skipped: Counter[str]) -> list[SourceFile]:
    """The readable files of a file or folder; counts files of other kinds in `skipped`."""
    if (why := _unreachable(path)) is not None:
        raise SettingError(f"data holds {entry!r}, which {why}")
    if path.is_file():
        if readers.format_of(path) is None:
            raise SettingError(f"data holds {entry!r}, a kind of file that can't be read; {_ALLOWED}")
        file = _source_file(path, entry, path.name)
        if not file.size:
            raise SettingError(f"data holds {entry!r}, which is an empty file; a file must hold some text")
        return [file]
    if not path.is_dir():
        raise SettingError(f"data holds {entry!r}, which is neither a file nor a folder; {_ALLOWED}")
    files = []
    for found in _below(path, entry, skipped):
        if readers.format_of(found) and not _is_special(found):
            files.append(_source_file(found, entry, found.relative_to(path).as_posix()))
        else:
            skipped[found.suffix.lower() or found.name] += 1
    if not files:
        raise SettingError(f"data holds {entry!r}, a folder without a file that can be read; {_ALLOWED}")
    return files


def _below(root: Path, entry: str, skipped: Counter[str]) -> Iterator[Path]:
    """The files below a folder and below the folders that links in it lead to, each folder once.

    A link to a hidden folder is hidden too. A link to a folder that the link or the root is in is counted in `skipped`.
    Raises SettingError for a link to nothing, which may be one to a folder, and for a folder that can't be read.
    """

    def refuse(error: OSError) -> None:
        raise SettingError(f"data holds {entry!r}, where {error.filename!r} can't be read: {error.strerror}") from error

    seen: set[tuple[int, int]] = set()
    waiting = deque([root])
    while waiting:
        for found in _walk(waiting.popleft(), seen, refuse):
            if (why := _unreachable(found)) is not None:
                raise SettingError(f"data holds {entry!r}, where {found.relative_to(root).as_posix()!r} {why}")
            if not os.path.isdir(found):
                yield found
            elif _is_around(found, root):
                skipped[_LINK_AROUND] += 1
            elif not _is_hidden(found, root):
                waiting.append(found)


def _unreachable(path: Path) -> str | None:
    """The end of a sentence about a link that leads to nothing; None for any other path."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return "is a link to nothing; a link must lead to a file or folder"
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "is a link to itself; a link must lead to a file or folder"
    return None


def _is_hidden(link: Path, root: Path) -> bool:
    """Whether a link leads to a folder that is hidden, or that is in a hidden one below the root."""
    inside, target = Path(os.path.realpath(root)), Path(os.path.realpath(link))
    names = target.relative_to(inside).parts if target.is_relative_to(inside) else [target.name]
    return any(name.startswith(".") for name in names)


def _is_around(link: Path, root: Path) -> bool:
    """Whether a link leads to a folder that it is in itself, or that the root is in."""
    inside = [Path(os.path.realpath(folder)) for folder in (root, link.parent)]
    target = Path(os.path.realpath(link))
    return any(target == folder or target in folder.parents for folder in inside)


def _walk(
    folder: Path,
    seen: set[tuple[int, int]],
    refuse: Callable[[OSError], None] | None = None,
    skipped: Set[str] = frozenset(),
) -> Iterator[Path]:
    """The files below a folder and links to folders, without what is hidden, the skipped folders and those `seen`.

    refuse: called with the error of a folder that can't be read; None passes it over.
    """
    for parent, folders, names in os.walk(folder, onerror=refuse):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skipped)
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        yield from (Path(parent, name) for name in sorted([*names, *links]) if not name.startswith("."))


def _is_special(path: Path) -> bool:
    """Whether a path is there and neither a file nor a folder, such as a pipe, which reading would wait for."""
    return os.path.exists(path) and not os.path.isfile(path)


def _source_file(path: Path, entry: str, name: str) -> SourceFile:
    try:
        status = path.stat()
    except OSError as error:
        raise SettingError(f"data holds {entry!r}, where {name!r} can't be read: {error.strerror}") from error
    return SourceFile(path, entry, name, status.st_size, status.st_mtime_ns, (status.st_dev, status.st_ino))


def _standard_library() -> Sources:
    """The library's .py files, without tests, bundled editor and installed packages: these differ per installation."""
    name = f"python standard library {platform.python_version()}"
    root = Path(sysconfig.get_path("stdlib"))
    below = _walk(root, set(), skipped=_STDLIB_SKIPPED_FOLDERS)
    found = [path for path in below if path.suffix == ".py" and path.is_file()]
    files = [_source_file(path, name, path.relative_to(root).as_posix()) for path in found]
    if not files:
        raise SettingError(
            "data is None, which reads the source of the Python standard library, but this Python has none on disk; "
            + _ALLOWED
        )
    files.sort(key=lambda file: _shuffle_key(file.name))
    return Sources([name], files, standard_library=True)
