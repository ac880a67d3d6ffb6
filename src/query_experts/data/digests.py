"""A set of digests in 24 to 48 bytes each: a Python set takes 100 and more, which is 4 GB for 40 million documents."""

DIGEST_BYTES = 16
_EMPTY = bytes(DIGEST_BYTES)
_FIRST_SLOTS = 1 << 10


class Digests:
    """A set of digests of 16 bytes, as an open-addressed table that doubles when two thirds of it are taken.

    40 million digests take 1.1 GB, and 1.6 GB for the moment in which the table grows.
    """

    def __init__(self) -> None:
        self._table = bytearray(_FIRST_SLOTS * DIGEST_BYTES)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, digest: object) -> bool:
        return isinstance(digest, bytes) and self._held(self._place(digest)) != _EMPTY

    def add(self, digest: bytes) -> bool:
        """Adds a digest. Returns whether it is new."""
        place = self._place(digest)
        if self._held(place) != _EMPTY:
            return False
        self._table[place : place + DIGEST_BYTES] = digest
        self._count += 1
        if 3 * DIGEST_BYTES * self._count > 2 * len(self._table):
            self._grow()
        return True

    def _held(self, place: int) -> bytearray:
        return self._table[place : place + DIGEST_BYTES]

    def _place(self, digest: bytes) -> int:
        """Where a digest is, or where it would be put."""
        mask = len(self._table) - 1
        place = int.from_bytes(digest[8:], "little") * DIGEST_BYTES & mask
        while (held := self._table[place : place + DIGEST_BYTES]) != digest and held != _EMPTY:
            place = place + DIGEST_BYTES & mask
        return place

    def _grow(self) -> None:
        before = self._table
        self._table = bytearray(2 * len(before))
        for start in range(0, len(before), DIGEST_BYTES):
            if (held := bytes(before[start : start + DIGEST_BYTES])) != _EMPTY:
                place = self._place(held)
                self._table[place : place + DIGEST_BYTES] = held
