"""Job files: YAML or JSON to a job's document, with the line of each of its values for messages."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

GREATEST_BYTES = 1_000_000  # the server takes no more


class BadSpecFile(Exception):
    """A job file that can't be read; says where and why."""


@dataclass(frozen=True)
class SpecFile:
    """A job file as read.

    Attributes:
        name: What to call the file in messages.
        document: The job, unchecked.
        lines: JSON pointer -> line, from 1; empty for a JSON file.
    """

    name: str
    document: dict[str, Any]
    lines: Mapping[str, int] = field(default_factory=dict)

    def locate(self, pointer: str) -> str:
        """Name the place that `pointer` points to, or the nearest one around it that the file has."""
        inner = pointer
        while inner and inner not in self.lines:
            inner = inner.rpartition("/")[0]
        place = f"{self.name}:{self.lines[inner]}" if inner in self.lines else self.name
        return f"{place}: {pointer or '/'}"


def read_spec_file(path: Path) -> SpecFile:
    """Read a job file: JSON if its name ends in `.json`, else YAML.

    Raises:
        BadSpecFile: If it can't be read, breaks its format, or holds no mapping.
    """
    try:
        text = path.read_bytes()[: GREATEST_BYTES + 1].decode("utf-8-sig")
    except OSError as error:
        raise BadSpecFile(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadSpecFile(f"{path}: is no UTF-8 text") from error
    if len(text.encode()) > GREATEST_BYTES:
        raise BadSpecFile(f"{path}: is larger than {GREATEST_BYTES:,} bytes")
    try:
        return _read_json(str(path), text) if path.suffix == ".json" else _read_yaml(str(path), text)
    except RecursionError as error:
        raise BadSpecFile(f"{path}: is nested too deeply") from error
    except ValueError as error:  # Python reads no number of more than 4,300 digits
        raise BadSpecFile(f"{path}: {error}") from error


def _read_json(name: str, text: str) -> SpecFile:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadSpecFile(f"{name}:{error.lineno}: {error.msg}") from error
    return SpecFile(name, _mapping(name, document))


def _read_yaml(name: str, text: str) -> SpecFile:
    try:
        lines, document = _compose(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise BadSpecFile(f"{name}{line}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise BadSpecFile(f"{name}: {error}") from error
    return SpecFile(name, _mapping(name, document), lines)


def _compose(text: str) -> tuple[dict[str, int], object]:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise yaml.YAMLError("is empty")
        return dict(_lines(node, "", ())), loader.construct_document(node)
    finally:
        loader.dispose()


def _mapping(name: str, document: object) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise BadSpecFile(f"{name}: must hold a job's fields, such as 'dataset:' and 'budget:'")
    return document


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema: as in JSON, 1e-3 is a number, and no, 12:30 and 2026-01-01 are text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own form


_CORE_SCHEMA = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
for _tag, (_pattern, _first) in _CORE_SCHEMA.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def _lines(node: yaml.Node, pointer: str, around: tuple[yaml.Node, ...]) -> Iterator[tuple[str, int]]:
    """The JSON pointer and line of each value inside the document; refuses what JSON has no form for."""
    if node in around:
        raise _fault(node, "an alias of something that holds it")
    if around:
        yield pointer, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _fault(key, "a key must be a word")
            if key.value in seen:
                raise _fault(key, f"'{key.value}' comes twice")
            seen.add(key.value)
            yield from _lines(value, f"{pointer}/{_escape(key.value)}", (*around, node))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _lines(value, f"{pointer}/{index}", (*around, node))


def _fault(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _escape(key: str) -> str:
    """A key as a part of a JSON pointer (RFC 6901)."""
    return key.replace("~", "~0").replace("/", "~1")
