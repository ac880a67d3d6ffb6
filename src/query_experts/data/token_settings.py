"""The settings that tokens on disk depend on."""

from dataclasses import asdict, dataclass
from pathlib import Path

from query_experts.common.errors import SettingError
from query_experts.data.tokenizing import SMALLEST_VOCABULARY


@dataclass(frozen=True)
class TokenSettings:
    """The settings that the tokens on disk depend on; `seq_len` isn't one of them."""

    vocab_size: int
    tokenizer: str | None
    validation_fraction: float
    max_bytes: int | None
    shard_bytes: int
    text_field: str

    def check(self) -> None:
        """Raises SettingError for a value of the wrong type or out of range."""
        if self.tokenizer is None:
            allowed = f"a whole number, at least {SMALLEST_VOCABULARY} (256 bytes and the end-of-text token)"
            check_value("vocab_size", self.vocab_size, is_whole(self.vocab_size, SMALLEST_VOCABULARY), allowed)
        fraction = self.validation_fraction
        valid = isinstance(fraction, int | float) and 0 < fraction < 1
        check_value("validation_fraction", fraction, valid, "a number above 0 and below 1")
        valid = self.max_bytes is None or is_whole(self.max_bytes, 1)
        check_value("max_bytes", self.max_bytes, valid, "a whole number, at least 1, or None")
        check_value("shard_bytes", self.shard_bytes, is_whole(self.shard_bytes, 4), "a whole number, at least 4")
        valid = isinstance(self.text_field, str) and self.text_field != ""
        check_value("text_field", self.text_field, valid, "the name of a field")

    def fingerprint(self) -> list[object]:
        """The settings that change the tokens, and the files of a tokenizer that is a folder."""
        if self.tokenizer is None:
            return [asdict(self)]
        folder = Path(self.tokenizer).expanduser()
        files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
        stats = [(path.name, path.stat()) for path in files]
        return [asdict(self) | {"vocab_size": 0}, [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]]


def check_value(name: str, value: object, valid: bool, allowed: str) -> None:
    if not valid:
        raise SettingError(f"{name} is {value!r}; it must be {allowed}")


def is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
