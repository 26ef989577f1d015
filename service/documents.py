"""JSON documents: what use-cases answer. Their contract is `schemas.py`, which says what is in each.

Documents are made from rows that this server wrote and checked, so nothing is validated again: for a page of
trials that, and parsing the JSON in it, took ten times as long as to read it.
"""

from typing import Any

import orjson

Document = dict[str, Any]


def verbatim(text: str | None) -> orjson.Fragment | None:
    """JSON that is stored as text, as a part of a document."""
    return None if text is None else orjson.Fragment(text)


def parse(text: str) -> Any:
    """JSON that was stored."""
    return orjson.loads(text)


def encode(document: Document) -> bytes:
    """A document as it is sent. Times end in Z; numbers that are not finite are null."""
    return orjson.dumps(document, option=orjson.OPT_UTC_Z)
