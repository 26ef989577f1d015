import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.models.backbones import MLP
from coterie.models.cost import count_cost
from coterie.models.export import (
    ARCHITECTURE_FILE,
    MAX_DOCUMENT_BYTES,
    WEIGHTS_FILE,
    ArchitectureError,
    Preprocessing,
    Standardize,
    load_architecture,
    write_architecture,
)
from coterie.models.static import GroupedNetwork
from coterie.models.tasks import Direction, Grouping, Task, TaskKind, TaskSet

TASKS = TaskSet(
    [
        Task(name="left parity", kind=TaskKind.BINARY, weight=0.5),
        Task(name="λ.loop", kind=TaskKind.BINARY, metric="accuracy", direction=Direction.MAXIMIZE),
        Task(name="at_least_5", kind=TaskKind.BINARY),
    ]
)
GROUPING = Grouping(((0, 2), (1,)))
BACKBONE = MLP(input_shape=(2, 3), width=4, depth=3)
PREPROCESSING = Preprocessing(mean=(0.25, -3.0), std=(0.1, 7.0))
SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def build(grouping: Grouping = GROUPING, split: int = 1, backbone: MLP = BACKBONE) -> GroupedNetwork:
    torch.manual_seed(0)
    return GroupedNetwork(backbone=backbone, tasks=TASKS, grouping=grouping, split=split).eval()


def write(folder: Path, network: GroupedNetwork | None = None, **metadata: Any) -> dict[str, Any]:
    return write_architecture(
        folder, network or build(), family="dmtg", preprocessing=PREPROCESSING, metadata=metadata
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path)
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / ARCHITECTURE_FILE
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def replace_weights(folder: Path, content: bytes) -> None:
    """Put other weights in, with the checksum that makes them look right."""
    (folder / WEIGHTS_FILE).write_bytes(content)
    rewrite(folder, lambda document: document["weights"].update(sha256=hashlib.sha256(content).hexdigest()))


@SHARED_FOLDER
@given(
    st.lists(st.integers(0, 2), min_size=3, max_size=3),
    st.integers(0, BACKBONE.units - 1),
    st.lists(st.tuples(st.floats(-9, 9), st.floats(0.1, 9)), min_size=1, max_size=2),
)
def test_a_loaded_network_gives_the_written_ones_outputs_on_raw_inputs(
    tmp_path: Path, labels: list[int], split: int, values: list[tuple[float, float]]
) -> None:
    network = build(Grouping.from_labels(labels), split)
    mean, std = zip(*values, strict=True)
    preprocessing = Preprocessing(mean=mean, std=std)
    write_architecture(tmp_path, network, family="grouped", preprocessing=preprocessing, metadata={})
    before = torch.get_rng_state()
    loaded = load_architecture(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in loaded.modules())
    raw = torch.randn(5, 2, 3)
    prepared = (raw - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]
    outputs, expected = loaded(raw), network(prepared)
    assert list(outputs) == list(TASKS.names)
    for name in TASKS.names:
        assert torch.equal(outputs[name], expected[name])


def test_whole_numbers_are_raw_inputs_too(folder: Path) -> None:
    loaded = load_architecture(folder)
    raw = torch.randint(0, 17, (4, 2, 3), dtype=torch.uint8)
    for name in TASKS.names:
        assert torch.equal(loaded(raw)[name], loaded(raw.float())[name])


def test_the_document_says_what_was_written(tmp_path: Path) -> None:
    network = build()
    document = write(tmp_path, network, metrics={"delta_m": 4.5}, seed=3)
    text = (tmp_path / ARCHITECTURE_FILE).read_text(encoding="utf-8")
    assert json.loads(text) == document
    assert text.count("\n") > 20
    assert "λ.loop" in text
    cost = count_cost(network, BACKBONE.input_shape)
    expected = {
        "format": "coterie-architecture",
        "version": 1,
        "family": "dmtg",
        "grouping": [["left parity", "at_least_5"], ["λ.loop"]],
        "backbone": {"name": "mlp", "input_shape": [2, 3], "width": 4, "depth": 3},
        "split": 1,
        "preprocessing": {"mean": [0.25, -3.0], "std": [0.1, 7.0]},
        "cost": {"macs": cost.macs, "params": cost.params},
        "metrics": {"delta_m": 4.5},
        "seed": 3,
    }
    assert {key: document[key] for key in expected} == expected
    assert document["tasks"][1] == {
        "name": "λ.loop",
        "kind": "binary",
        "outputs": 1,
        "metric": "accuracy",
        "direction": "maximize",
        "weight": 1.0,
    }
    assert set(document["versions"]) == {"coterie", "torch"}


def test_sharing_by_hand(folder: Path) -> None:
    sharing = json.loads((folder / ARCHITECTURE_FILE).read_text(encoding="utf-8"))["sharing"]
    # prefix 6 -> 4 for three tasks, branches 4 -> 4 -> 4 for two tasks and for one, heads 4 -> 1
    assert sharing == {
        "prefix": {"tasks": ["left parity", "λ.loop", "at_least_5"], "units": 1, "macs": 24},
        "branches": [
            {"tasks": ["left parity", "at_least_5"], "units": 2, "macs": 32},
            {"tasks": ["λ.loop"], "units": 2, "macs": 32},
        ],
        "macs_by_task": {"left parity": 8 + 16 + 4, "λ.loop": 8 + 32 + 4, "at_least_5": 8 + 16 + 4},
    }


@SHARED_FOLDER
@given(st.lists(st.integers(0, 2), min_size=3, max_size=3), st.integers(0, BACKBONE.units - 1))
def test_macs_by_task_add_up_to_the_whole(tmp_path: Path, labels: list[int], split: int) -> None:
    document = write(tmp_path, build(Grouping.from_labels(labels), split))
    by_task = document["sharing"]["macs_by_task"]
    assert list(by_task) == list(TASKS.names)
    assert sum(by_task.values()) == pytest.approx(document["cost"]["macs"])


def test_loaded_weights_do_not_follow_the_file(folder: Path) -> None:
    loaded = load_architecture(folder)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    path = folder / WEIGHTS_FILE
    with path.open("r+b") as file:
        file.seek(-200, os.SEEK_END)
        file.write(bytes(200))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("metadata", [{"seed": float("nan")}, {"value": float("inf")}, {"family": "mine"}])
def test_metadata_that_is_not_json_or_takes_a_key_of_the_format_writes_nothing(
    tmp_path: Path, metadata: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"JSON|metadata: must not use"):
        write(tmp_path, **metadata)
    assert not list(tmp_path.iterdir())


def test_writing_again_replaces_and_leaves_nothing_else(folder: Path) -> None:
    write(folder, build(Grouping.apart(3), split=0))
    assert len(load_architecture(folder).get_submodule("network.branches")._modules) == 3
    assert sorted(path.name for path in folder.iterdir()) == [ARCHITECTURE_FILE, WEIGHTS_FILE]


@pytest.mark.parametrize("written", [0, 1])
def test_a_write_that_is_cut_short_leaves_the_old_network_or_a_clear_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    replaced: list[Path] = []

    def replace(source: Path, target: Path) -> None:
        if len(replaced) == written:
            raise OSError("disk full")
        replaced.append(target)
        shutil.move(source, target)

    torch.manual_seed(7)
    other = GroupedNetwork(backbone=BACKBONE, tasks=TASKS, grouping=GROUPING, split=1)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="disk full"):
        write(folder, other)
    assert sorted(path.name for path in folder.iterdir()) == [ARCHITECTURE_FILE, WEIGHTS_FILE]
    if written:
        with pytest.raises(ArchitectureError, match="checksum"):
            load_architecture(folder)
    else:
        expected = build().state_dict()["heads.0.weight"]
        assert torch.equal(load_architecture(folder).get_parameter("network.heads.0.weight"), expected)


def test_the_document_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def replace(source: Path, target: Path) -> None:
        seen.append(target.name)
        shutil.move(source, target)

    monkeypatch.setattr(os, "replace", replace)
    write(tmp_path)
    assert seen == [WEIGHTS_FILE, ARCHITECTURE_FILE]


Document = dict[str, Any]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda d: d.update(format="other"), id="another format"),
        pytest.param(lambda d: d.update(version=2), id="a later version"),
        pytest.param(lambda d: d.pop("version"), id="no version"),
        pytest.param(lambda d: d.update(tasks=[]), id="no tasks"),
        pytest.param(lambda d: d.update(tasks={"a": 1}), id="tasks not a list"),
        pytest.param(lambda d: d.update(tasks=["a"]), id="a task not an object"),
        pytest.param(lambda d: d["tasks"].append(d["tasks"][0]), id="a task twice"),
        pytest.param(lambda d: d["tasks"][0].update(kind="nonsense"), id="an unknown kind"),
        pytest.param(lambda d: d["tasks"][0].update(kind="regression"), id="a kind without a head"),
        pytest.param(lambda d: d["tasks"][0].update(name=5), id="a name that is no text"),
        pytest.param(lambda d: d["tasks"][0].update(outputs=10**12), id="endless outputs"),
        pytest.param(lambda d: d["tasks"][0].update(direction="up"), id="an unknown direction"),
        pytest.param(lambda d: d["tasks"][0].update(weight="1"), id="a weight that is no number"),
        pytest.param(lambda d: d.pop("grouping"), id="no grouping"),
        pytest.param(lambda d: d.update(grouping=[["left parity"]]), id="a grouping of other tasks"),
        pytest.param(lambda d: d.update(grouping=[5]), id="a group that is no list"),
        pytest.param(lambda d: d.update(grouping=[[["left parity"]]]), id="a group in a group"),
        pytest.param(lambda d: d.update(grouping=[[name] for name in TASKS.names]), id="more groups"),
        pytest.param(lambda d: d.update(split=2), id="another split"),
        pytest.param(lambda d: d.update(split=3), id="a split beyond the units"),
        pytest.param(lambda d: d.update(split=-(10**12)), id="an endless negative split"),
        pytest.param(lambda d: d.update(split=True), id="a split that is no number"),
        pytest.param(lambda d: d.update(backbone="mlp"), id="a backbone that is no object"),
        pytest.param(lambda d: d["backbone"].update(name="nonsense"), id="an unknown backbone"),
        pytest.param(lambda d: d["backbone"].update(name=["mlp"]), id="a backbone's name that is no text"),
        pytest.param(lambda d: d["backbone"].update(width=5), id="another width"),
        pytest.param(
            lambda d: d["backbone"].update(width=65_536, depth=1_024), id="all sizes at their bound"
        ),
        pytest.param(lambda d: d["backbone"].update(depth=10**12), id="an endless depth"),
        pytest.param(lambda d: d["backbone"].update(width=10**12), id="an endless width"),
        pytest.param(lambda d: d["backbone"].update(input_shape=[2, 10**12]), id="an endless input"),
        pytest.param(lambda d: d["backbone"].update(input_shape=[]), id="no input"),
        pytest.param(lambda d: d.update(preprocessing=None), id="no preprocessing"),
        pytest.param(lambda d: d["preprocessing"].update(std=[0.0, 1.0]), id="a std of zero"),
        pytest.param(lambda d: d["preprocessing"].update(mean=["a", "b"]), id="a mean that is no number"),
        pytest.param(lambda d: d["preprocessing"].update(mean=[0] * 3, std=[1] * 3), id="values for 3 of 2"),
        pytest.param(lambda d: d["preprocessing"].update(mean=[10**400, 0]), id="a mean beyond any float"),
        pytest.param(lambda d: d.update(weights="here"), id="weights not an object"),
        pytest.param(lambda d: d["weights"].update(sha256="0" * 64), id="another checksum"),
    ],
)
def test_a_document_that_is_wrong_is_refused(folder: Path, change: Callable[[Document], object]) -> None:
    rewrite(folder, change)
    with pytest.raises(ArchitectureError):
        load_architecture(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"format": NaN}',
        b"[" * 100_000,
        b'{"version": ' + b"9" * 10_000 + b"}",
    ],
    ids=["empty", "cut", "a list", "null", "not UTF-8", "NaN", "deep", "a huge number"],
)
def test_a_document_that_is_no_json_object_is_refused(folder: Path, content: bytes) -> None:
    (folder / ARCHITECTURE_FILE).write_bytes(content)
    with pytest.raises(ArchitectureError):
        load_architecture(folder)


def test_a_document_beyond_the_limit_is_refused_before_it_is_parsed(folder: Path) -> None:
    path = folder / ARCHITECTURE_FILE
    path.write_bytes(path.read_bytes() + b" " * MAX_DOCUMENT_BYTES)
    with pytest.raises(ArchitectureError, match="must be at most"):
        load_architecture(folder)


def test_json_that_is_fine_but_for_nan_is_refused(folder: Path) -> None:
    rewrite(folder, lambda document: document.update(seed=float("nan")))
    with pytest.raises(ArchitectureError, match="NaN"):
        load_architecture(folder)


@pytest.mark.parametrize("name", [ARCHITECTURE_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ArchitectureError, match=name):
        load_architecture(folder)


@SHARED_FOLDER
@given(st.data())
def test_truncated_weights_are_refused_with_and_without_a_right_checksum(
    tmp_path: Path, data: st.DataObject
) -> None:
    write(tmp_path)
    content = (tmp_path / WEIGHTS_FILE).read_bytes()
    cut = content[: data.draw(st.integers(0, len(content) - 1))]
    (tmp_path / WEIGHTS_FILE).write_bytes(cut)
    with pytest.raises(ArchitectureError, match="checksum"):
        load_architecture(tmp_path)
    replace_weights(tmp_path, cut)
    with pytest.raises(ArchitectureError):
        load_architecture(tmp_path)


@SHARED_FOLDER
@given(st.data())
def test_any_flipped_byte_of_the_weights_is_noticed(tmp_path: Path, data: st.DataObject) -> None:
    write(tmp_path)
    content = bytearray((tmp_path / WEIGHTS_FILE).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (tmp_path / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(ArchitectureError, match="checksum"):
        load_architecture(tmp_path)


State = dict[str, Tensor]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("heads.1.bias"), r"heads.1.bias: must be .* found None"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra: must be None, found"),
        (lambda s: s.update({"heads.1.bias": torch.zeros(2)}), r"heads.1.bias: must be .*\(1,\)\), found"),
        (
            lambda s: s.update({"heads.1.bias": torch.zeros(1).double()}),
            "heads.1.bias: must be .* found .*F64",
        ),
        (lambda s: s.clear(), "must hold 8 tensors or more, found 0"),
    ],
    ids=["missing", "extra", "of another shape", "of another type", "none"],
)
def test_weights_of_another_network_are_refused(
    folder: Path, change: Callable[[State], object], message: str
) -> None:
    state = build().state_dict()
    change(state)
    replace_weights(folder, safetensors.torch.save(state))
    with pytest.raises(ArchitectureError, match=message):
        load_architecture(folder)


def test_a_header_that_declares_more_than_the_file_holds_is_refused(folder: Path) -> None:
    header = json.dumps(
        {"heads.0.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    ).encode()
    replace_weights(folder, len(header).to_bytes(8, "little") + header)
    with pytest.raises(ArchitectureError):
        load_architecture(folder)


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_in_place_of_the_weights_is_not_run(folder: Path) -> None:
    exploded = folder / "exploded"
    content = pickle.dumps(Bomb(exploded))
    pickle.loads(content)
    exploded.unlink()
    replace_weights(folder, content)
    with pytest.raises(ArchitectureError):
        load_architecture(folder)
    assert not exploded.exists()


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((), ()),
        ((0.0,), (1.0, 1.0)),
        ((float("nan"),), (1.0,)),
        ((0.0,), (0.0,)),
        ((0.0,), (-1.0,)),
        ((0.0,), (float("inf"),)),
        ((1e39,), (1.0,)),
        ((0.0,), (1e-46,)),
    ],
)
def test_a_preprocessing_that_breaks_a_rule_is_refused(
    mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    with pytest.raises(ValueError, match="must be"):
        Preprocessing(mean=mean, std=std)


def test_whole_numbers_serve_as_well() -> None:
    standardize = Standardize(Preprocessing(mean=(1,), std=(2,)), (3,))
    assert {buffer.dtype for buffer in standardize.buffers()} == {torch.float32}
    assert torch.equal(standardize(torch.full((1, 3), 4.0)), torch.full((1, 3), 1.5))


def test_values_are_per_index_of_the_first_axis() -> None:
    standardize = Standardize(Preprocessing(mean=(1.0, 2.0), std=(2.0, 4.0)), (2, 3))
    x = torch.full((5, 2, 3), 6.0)
    expected = torch.tensor([2.5, 1.0])[None, :, None].expand(5, 2, 3)
    assert torch.equal(standardize(x), expected)
    with pytest.raises(ValueError, match="must have 1 or 3 values, found 2"):
        Standardize(Preprocessing(mean=(1.0, 2.0), std=(2.0, 4.0)), (3, 2))
