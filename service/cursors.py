"""Cursors: where a page of a list ended. Clients give them back and never look inside."""

import base64
import binascii
import math
import re
from collections.abc import Sequence

from coterie.search.faults import Fault

_ORDER = r"[A-Za-z0-9_.+-]+"
_POSITION = r"0|[1-9][0-9]{0,17}"  # 18 digits fit 64 bits
_VALUE = r"-?[0-9.]{1,24}(?:e[+-]?[0-9]{1,3})?"  # as Python writes a float
_PLACE = re.compile(f"({_ORDER}):({_POSITION})")
_VALUE_AND_PLACE = re.compile(f"({_ORDER}):({_VALUE}):({_POSITION})")


class InvalidQuery(Exception):
    """A query or header parameter that can't be used.

    Attributes:
        faults: What is wrong, at least one.
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("; ".join(f"{fault.pointer}: {fault.detail}" for fault in faults))
        self.faults = tuple(faults)


def encode_cursor(order: str, position: int) -> str:
    """The cursor after `position` in a list of this order."""
    return _encode(f"{order}:{position}")


def decode_cursor(order: str, cursor: str | None) -> int | None:
    """The position in a cursor of a list of this order.

    Raises:
        InvalidQuery: If the cursor is not one of ours, or of another order.
    """
    return None if cursor is None else int(_parts(_PLACE, order, cursor)[2])


def encode_value_cursor(order: str, value: float, position: int) -> str:
    """The cursor after a value, and a position among equal values, in a list that is sorted by value."""
    return _encode(f"{order}:{value!r}:{position}")


def decode_value_cursor(order: str, cursor: str | None) -> tuple[float, int] | None:
    """The value and the position in a cursor of a list that is sorted by value.

    Raises:
        InvalidQuery: If the cursor is not one of ours, or of another order.
    """
    if cursor is None:
        return None
    parts = _parts(_VALUE_AND_PLACE, order, cursor)
    try:
        value = float(parts[2])
    except ValueError:
        raise _invalid() from None
    if not math.isfinite(value):
        raise _invalid()
    return value, int(parts[3])


def _encode(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _parts(pattern: re.Pattern[str], order: str, cursor: str) -> re.Match[str]:
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode(
            "ascii"
        )
    except (binascii.Error, ValueError):
        raise _invalid() from None
    found = pattern.fullmatch(text)
    if found is None or found[1] != order:
        raise _invalid()
    return found


def _invalid() -> InvalidQuery:
    return InvalidQuery(
        [Fault("/query/cursor", "must be the next_cursor of a page of this list, in this order")]
    )
