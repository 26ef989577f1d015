"""Job files: what they may hold, and what is said of those that can't be read."""

import math
from pathlib import Path

import pytest

from coterie.service.spec_file import BadSpecFile, read_spec_file


def write(tmp_path: Path, text: str, name: str = "job.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_scalars_are_read_as_in_json(tmp_path: Path) -> None:
    text = "a: [1e-3, 1.5, -2, .5, no, 2026-01-01, 12:30, 010x, true, ~, .inf]\nb: {c: yes}"
    document = read_spec_file(write(tmp_path, text)).document
    expected = [1e-3, 1.5, -2, 0.5, "no", "2026-01-01", "12:30", "010x", True, None, math.inf]
    assert document == {"a": expected, "b": {"c": "yes"}}


def test_json_is_read_by_its_suffix(tmp_path: Path) -> None:
    assert read_spec_file(write(tmp_path, '{"a":\t1}', "job.json")).document == {"a": 1}


def test_a_pointer_is_located_at_its_line_or_the_nearest_around_it(tmp_path: Path) -> None:
    path = write(tmp_path, "name: x\nbudget:\n  trials: -1\ntasks:\n  - a\n  - b\n'x/y': 1\n")
    spec = read_spec_file(path)
    assert spec.locate("/budget/trials") == f"{path}:3: /budget/trials"
    assert spec.locate("/tasks/1") == f"{path}:6: /tasks/1"
    assert spec.locate("/tasks/1/weight") == f"{path}:6: /tasks/1/weight"
    assert spec.locate("/x~1y") == f"{path}:7: /x~1y"
    assert spec.locate("/dataset") == f"{path}: /dataset"
    assert spec.locate("") == f"{path}: /"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: 1\nb: [1\n", ":3: expected"),
        ("a: 1\n\tb: 2\n", ":2: found character"),
        ("a: 1\nb: 2\na: 3\n", ":3: 'a' comes twice"),
        ("a: &x\n  b: *x\n", ": an alias of something that holds it"),
        ("a: !!python/object/apply:os.system [ls]\n", ":1: could not determine a constructor"),
        ("? [a]\n: 1\n", ":1: a key must be a word"),
        ("", ": is empty"),
        ("- a\n- b\n", ": must hold a job's fields"),
        ("just words\n", ": must hold a job's fields"),
        ("a: \x00\n", ": unacceptable character"),
        ("a: " + "9" * 5000, ": Exceeds the limit"),
        ("[" * 100_000, ": is nested too deeply"),
        ("#" * 1_000_001, ": is larger than 1,000,000 bytes"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_its_place(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(BadSpecFile) as refused:
        read_spec_file(write(tmp_path, text))
    assert f"job.yaml{fault}" in str(refused.value) or fault in str(refused.value)


def test_bad_json_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(BadSpecFile, match=r"job\.json:2: Expecting value"):
        read_spec_file(write(tmp_path, '{"a":\n}', "job.json"))


def test_no_file_a_folder_and_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    for name, fault in (
        ("none", "No such file"),
        (".", "Is a directory"),
        ("latin.yaml", "is no UTF-8 text"),
    ):
        with pytest.raises(BadSpecFile, match=fault):
            read_spec_file(tmp_path / name)
