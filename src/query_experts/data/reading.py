"""Reads the texts of sources in their order from any place on, and tells the place."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from query_experts.common.errors import SettingError
from query_experts.data import readers
from query_experts.data.documents import digest_of
from query_experts.data.readers import HubPlace
from query_experts.data.sources import Sources


class Reading:
    """Iterates over the texts of sources, first those of the files, then those of the hub data sets.

    To go on from a place, the texts before it in the same file, or in the same shard of a data set, are read again, and
    the last of them must be the text that was there: else SettingError.

    Args:
        sources: what to read.
        revisions: the commit of each hub data set, in the order of the sources.
        text_field: field of a .jsonl line, or column, that holds the text.
        scratch: folder for a decompressed parquet file.
        place: what `place` gave; None for the start.
    """

    def __init__(
        self,
        sources: Sources,
        revisions: Sequence[str | None],
        text_field: str,
        scratch: Path,
        place: dict[str, Any] | None = None,
    ) -> None:
        self._sources, self._revisions = sources, revisions
        self._text_field, self._scratch = text_field, scratch
        self._start = place
        self._source = 0  # number of the file or data set
        self._texts = 0  # that were read of it
        self._hub = HubPlace()
        self._last: str | None = None

    def place(self) -> dict[str, Any]:
        """Where the reading is, as JSON can hold it."""
        last = None if self._last is None else digest_of(self._last.encode()).hex()
        return {"source": self._source, "texts": self._texts, "hub": asdict(self._hub), "last": last}

    def __iter__(self) -> Iterator[str]:
        begin = self._start["source"] if self._start else 0
        for source in range(begin, len(self._sources.files) + len(self._sources.hub)):
            self._source, self._texts, self._hub, self._last = source, 0, HubPlace(), None
            texts = self._of_source() if source > begin or self._start is None else self._rest(self._start)
            for text in texts:
                self._texts += 1
                self._last = text
                yield text

    def _of_source(self) -> Iterator[str]:
        files = self._sources.files
        if self._source < len(files):
            return readers.read_file(files[self._source].path, self._text_field, self._scratch)
        number = self._source - len(files)
        name, config = self._sources.hub[number]
        return readers.read_hub(name, config, self._text_field, self._revisions[number], self._hub)

    def _rest(self, place: dict[str, Any]) -> Iterator[str]:
        """The texts of the source in which the place is, from there on."""
        again = place["texts"]
        if self._source >= len(self._sources.files) and place["hub"]["row"]:
            again = 1
            self._hub = HubPlace(place["hub"]["shard"], place["hub"]["row"] - 1)
        texts = self._of_source()
        for last in islice(texts, again - 1, again) if again else ():
            self._last = last
        if place["last"] != self.place()["last"]:
            raise SettingError(
                f"data holds {self._name()!r}, in which text {place['texts']} isn't the one that was there when the "
                "tokens were begun; prepare it into another folder"
            )
        self._texts = place["texts"]
        return texts

    def _name(self) -> str:
        files = self._sources.files
        if self._source < len(files):
            return str(files[self._source].path)
        name, config = self._sources.hub[self._source - len(files)]
        return name if config is None else f"{name}:{config}"
