"""JSON from someone who may mean no good: parsed, and held to a schema."""

import json
import math
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from coterie.search.faults import Fault, SpecError, escape

LIMIT_DEPTH = 64
LIMIT_ITEMS = 1000  # of any list or object; no schema of ours allows more
LIMIT_FAULTS = 50
LIMIT_POINTER = 200
_STORABLE = "of whole characters, and none of them NUL"
Model = TypeVar("Model", bound=BaseModel)
_DIGITS = 300  # an integer of more is read as a float: below it, each fits one
_WORDS = {  # where pydantic speaks of Python
    "model_type": "Input should be an object",
    "int_parsing_size": "Input is too large for an integer",
}


class MalformedBody(Exception):
    """The body is missing, no JSON, names a field twice, or is nested beyond `LIMIT_DEPTH`."""


def parse_json(body: bytes) -> Any:
    """Parse a body and refuse what JSON or our storage can't hold.

    Raises:
        MalformedBody: If it is no JSON in UTF-8, names a field twice, or is nested too deeply.
        SpecError: If a number is not finite, a text holds half a character, or a list is too long.
    """
    if not body.strip():
        raise MalformedBody("the body must be a JSON document, and there is none")
    try:
        document = json.loads(body.decode("utf-8"), parse_int=_parse_int, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise MalformedBody(f"the body must be UTF-8: byte {error.start} is not") from None
    except json.JSONDecodeError as error:
        raise MalformedBody(
            f"the body must be JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from None
    except RecursionError:
        raise _too_deep() from None
    faults: list[Fault] = []
    _collect_faults(document, "", 0, faults)
    if faults:
        raise SpecError(faults[:LIMIT_FAULTS])
    return document


def validate(model: type[Model], document: object) -> Model:
    """Hold a document to a schema.

    Raises:
        SpecError: With what breaks the schema, by JSON pointer; the input is not in it.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        details: dict[str, list[str]] = {}
        for fault in error.errors(include_url=False, include_input=False):
            pointer = _pointer(document, fault["loc"], missing=fault["type"] == "missing")
            message = _WORDS.get(fault["type"], fault["msg"])
            found = details.setdefault(pointer, [])
            if message not in found:
                found.append(message)
        faults = [Fault(pointer, "; or ".join(found)) for pointer, found in details.items()]
        raise SpecError(faults[:LIMIT_FAULTS]) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):  # whoever checks the body before us may take another one (RFC 8259, 4)
        raise MalformedBody("the body must name each field of an object once")
    return document


def _parse_int(digits: str) -> int | float:
    return int(digits) if len(digits) <= _DIGITS else float(digits)


def _collect_faults(value: object, pointer: str, depth: int, faults: list[Fault]) -> None:
    if len(faults) >= LIMIT_FAULTS:
        return  # a body can hold hundreds of thousands, each with a long pointer
    if isinstance(value, str):
        if not _storable(value):
            faults.append(Fault(pointer, f"text must be {_STORABLE}"))
    elif isinstance(value, float):
        if not math.isfinite(value):
            faults.append(Fault(pointer, "number must be finite, and below 1.8e308"))
    elif isinstance(value, dict | list):
        if depth == LIMIT_DEPTH:
            raise _too_deep()
        if len(value) > LIMIT_ITEMS:
            faults.append(Fault(pointer, f"must hold at most {LIMIT_ITEMS:,} items, not {len(value):,}"))
            return
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(key, str) and not _storable(key):
                faults.append(Fault(pointer, f"field names must be {_STORABLE}"))
            else:
                _collect_faults(item, f"{pointer}/{_token(key)}", depth + 1, faults)


def _too_deep() -> MalformedBody:
    return MalformedBody(f"the body must not be nested deeper than {LIMIT_DEPTH} levels")


def _storable(text: str) -> bool:
    """Whether every database holds it, and can look for it: PostgreSQL knows no NUL."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _pointer(document: object, location: tuple[str | int, ...], *, missing: bool) -> str:
    """Pydantic's location without the names of union branches, which are no part of the document."""
    tokens: list[str] = []
    here = document
    for part in location:
        if (isinstance(here, dict) and part in here) or (
            isinstance(here, list) and isinstance(part, int) and part < len(here)
        ):
            here = here[part]  # type: ignore[index] # one of the two it is
            tokens.append(_token(part))
    if missing:
        tokens.append(_token(location[-1]))
    return "".join(f"/{token}" for token in tokens)


def _token(part: str | int) -> str:
    text = escape(part)
    return text if len(text) <= LIMIT_POINTER else f"{text[:LIMIT_POINTER]}…"
