import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from coterie.models.backbones import BACKBONES, MLP, Backbone
from coterie.models.cost import count_cost
from coterie.models.export import (
    ARCHITECTURE_FILE,
    MAX_DOCUMENT_BYTES,
    MAX_MODULES,
    MAX_NAME,
    WEIGHTS_FILE,
    ArchitectureError,
    Preprocessing,
    describe,
    load_architecture,
    write_architecture,
)
from coterie.models.families import Grouped, build_network
from coterie.models.layers import KINDS, check_layer, settings_of
from coterie.models.static import Graph, StaticNetwork
from coterie.models.tasks import KIND_LOSSES, KIND_METRICS, Grouping, Task, TaskKind, TaskSet
from tests.models.networks import MAP_TASKS, TOKEN_TASKS, filled, map_graph, token_graph

TASKS = TaskSet(
    [
        Task(name="left parity", kind=TaskKind.BINARY, weight=0.5),
        Task(name="λ.loop", kind=TaskKind.BINARY, metric="accuracy"),
        Task(name="at_least_5", kind=TaskKind.BINARY),
    ]
)
GROUPING = Grouping(((0, 2), (1,)))
BACKBONE = MLP(input_shape=(2, 3), width=4, depth=3)
PREPROCESSING = Preprocessing(mean=(0.25, -3.0), std=(0.1, 7.0))
SHARED_FOLDER = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
SCHEMA = json.loads(files("coterie.models").joinpath("architecture.schema.json").read_text("utf-8"))

Document = dict[str, Any]
State = dict[str, Tensor]


def build(grouping: Grouping = GROUPING, split: int = 1) -> StaticNetwork:
    torch.manual_seed(0)
    names = grouping.names(TASKS)
    return Grouped(backbone=BACKBONE, tasks=TASKS, grouping=names, split=split).prune()


def write(
    folder: Path,
    network: StaticNetwork | None = None,
    tasks: TaskSet = TASKS,
    backbone: Backbone = BACKBONE,
    grouping: Grouping | None = GROUPING,
    preprocessing: Preprocessing = PREPROCESSING,
    **metadata: Any,
) -> Document:
    return write_architecture(
        folder,
        network or build(),
        family="dmtg",
        tasks=tasks,
        backbone=backbone,
        grouping=grouping,
        preprocessing=preprocessing,
        metadata=metadata,
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    write(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, written: Path) -> Path:
    return shutil.copytree(written, tmp_path, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def written_by_hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that has most kinds of layer."""
    folder = tmp_path_factory.mktemp("by_hand")
    one = Preprocessing(mean=(0.5,), std=(2.0,))
    write(folder, filled(map_graph()), tasks=MAP_TASKS, grouping=None, preprocessing=one)
    return folder


@pytest.fixture
def by_hand(tmp_path: Path, written_by_hand: Path) -> Path:
    return shutil.copytree(written_by_hand, tmp_path, dirs_exist_ok=True)


def read(folder: Path) -> Document:
    document: Document = json.loads((folder / ARCHITECTURE_FILE).read_text(encoding="utf-8"))
    return document


def rewrite(folder: Path, change: Callable[[Document], object]) -> None:
    document = read(folder)
    change(document)
    (folder / ARCHITECTURE_FILE).write_text(json.dumps(document), encoding="utf-8")


def replace_weights(folder: Path, content: bytes) -> None:
    """Put other weights in, with the checksum that makes them look right."""
    (folder / WEIGHTS_FILE).write_bytes(content)
    rewrite(folder, lambda document: document["weights"].update(sha256=hashlib.sha256(content).hexdigest()))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


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
    write(tmp_path, network, preprocessing=Preprocessing(mean=mean, std=std))
    before = torch.get_rng_state()
    loaded = load_architecture(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in loaded.modules())
    raw = torch.randn(5, 2, 3)
    prepared = (raw - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]
    assert_equal(loaded(raw), network(prepared))


@pytest.mark.parametrize(
    ("name", "family"), [*((name, "grouped") for name in BACKBONES), ("cnn", "shared"), ("resnet20", "dmtg")]
)
def test_every_backbone_comes_back_in_every_grouping(tmp_path: Path, name: str, family: str) -> None:
    tasks = [
        Task(name="binary", kind=TaskKind.BINARY),
        Task(name="classes", kind=TaskKind.MULTICLASS, outputs=3),
        Task(name="number", kind=TaskKind.REGRESSION),
        Task(name="numbers", kind=TaskKind.REGRESSION, outputs=2),
    ]
    backbone: Backbone
    if name == "mlp":
        backbone = MLP(input_shape=(3, 4), width=5, depth=2)
    else:
        tasks += [
            Task(name="segments", kind=TaskKind.SEGMENTATION, outputs=2),
            Task(name="depth", kind=TaskKind.DEPTH),
            Task(name="normals", kind=TaskKind.NORMALS, outputs=3),
            Task(name="maps", kind=TaskKind.DENSE_REGRESSION, outputs=2),
            Task(name="map", kind=TaskKind.DENSE_REGRESSION),
        ]
        backbone = BACKBONES[name](input_shape=(3, 16, 16), width=0.0625)  # type: ignore[call-arg]
    parameters: dict[str, dict[str, Any]] = {
        "shared": {},
        "grouped": {
            "grouping": [[task.name for task in tasks[::2]], [task.name for task in tasks[1::2]]],
            "split": backbone.units - 1,
        },
        "dmtg": {"groups": 2, "split": 1},
    }
    torch.manual_seed(0)
    task_set = TaskSet(tasks)
    trained = build_network(family, backbone=backbone, tasks=task_set, parameters=parameters[family])
    for module in trained.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.num_batches_tracked.add_(7)  # type: ignore[union-attr]
    network = trained.prune()
    one = Preprocessing(mean=(0.5,), std=(2.0,))
    document = write(
        tmp_path, network, tasks=task_set, backbone=backbone, grouping=trained.grouping, preprocessing=one
    )
    jsonschema.validate(document, SCHEMA)
    loaded = load_architecture(tmp_path)
    raw = torch.randn(2, *backbone.input_shape)
    assert_equal(loaded(raw), network((raw - 0.5) / 2.0))
    cost = count_cost(network, backbone.input_shape)
    assert document["cost"] == {"macs": cost.macs, "params": cost.params}


@pytest.mark.parametrize(("graph", "tasks"), [(map_graph(), MAP_TASKS), (token_graph(), TOKEN_TASKS)])
def test_every_kind_of_layer_comes_back(tmp_path: Path, graph: Graph, tasks: TaskSet) -> None:
    network = filled(graph)
    one = Preprocessing(mean=(-0.25,), std=(4.0,))
    document = write(tmp_path, network, tasks=tasks, grouping=None, preprocessing=one)
    jsonschema.validate(document, SCHEMA)
    assert document["grouping"] is None
    raw = torch.randn(3, *graph.input_shape)
    assert_equal(load_architecture(tmp_path)(raw), network((raw + 0.25) / 4.0))


def test_the_networks_made_by_hand_have_every_kind() -> None:
    kinds = {layer.kind for graph in (map_graph(), token_graph()) for layer in graph.nodes}
    assert kinds | {"standardize"} == set(KINDS)


def test_whole_numbers_are_raw_inputs_too(folder: Path) -> None:
    loaded = load_architecture(folder)
    raw = torch.randint(0, 17, (4, 2, 3), dtype=torch.uint8)
    assert_equal(loaded(raw), loaded(raw.float()))


def test_values_are_per_index_of_the_first_axis(folder: Path) -> None:
    rewrite(folder, lambda d: d.update(preprocessing={"mean": [1, 2], "std": [2, 4]}))
    layer = load_architecture(folder).layer("standardize")
    assert {buffer.dtype for buffer in layer.buffers()} == {torch.float32}
    expected = torch.tensor([2.5, 1.0])[None, :, None].expand(5, 2, 3)
    assert torch.equal(layer(torch.full((5, 2, 3), 6.0)), expected)


def test_the_document_says_what_was_written(tmp_path: Path) -> None:
    network = build()
    document = write(tmp_path, network, metrics={"delta_m": 4.5}, seed=3)
    text = (tmp_path / ARCHITECTURE_FILE).read_text(encoding="utf-8")
    assert json.loads(text) == document
    jsonschema.validate(document, SCHEMA)
    cost = count_cost(network, BACKBONE.input_shape)
    expected = {
        "format": "coterie-architecture",
        "version": 2,
        "family": "dmtg",
        "grouping": [["left parity", "at_least_5"], ["λ.loop"]],
        "backbone": {"name": "mlp", "input_shape": [2, 3], "width": 4, "depth": 3},
        "input_shape": [2, 3],
        "preprocessing": {"mean": [0.25, -3.0], "std": [0.1, 7.0]},
        "outputs": {
            "left parity": "heads.0.squeeze",
            "λ.loop": "heads.1.squeeze",
            "at_least_5": "heads.2.squeeze",
        },
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
        "loss": "cross_entropy",
        "weight": 1.0,
    }
    assert document["nodes"][1] == {
        "name": "prefix.linear1",
        "kind": "linear",
        "inputs": ["prefix.flatten"],
        "settings": {"inputs": 6, "outputs": 4},
    }
    assert set(document["versions"]) == {"coterie", "torch"}


def test_the_document_reads_as_a_layer_a_line(by_hand: Path) -> None:
    lines = (by_hand / ARCHITECTURE_FILE).read_text(encoding="utf-8").splitlines()
    for layer in read(by_hand)["nodes"]:
        assert json.dumps(layer) in [line.strip().rstrip(",") for line in lines]
    assert any("λ.depth" in line for line in lines)


def test_sharing_by_hand() -> None:
    sharing = describe(build())
    everyone, group = ["left parity", "λ.loop", "at_least_5"], ["left parity", "at_least_5"]
    layers = [(layer["name"], layer["tasks"], layer["params"], layer["macs"]) for layer in sharing["layers"]]
    # prefix 6 -> 4 for three tasks, branches 4 -> 4 -> 4 for two tasks and for one, heads 4 -> 1
    assert layers == [
        ("prefix.linear1", everyone, 28, 24),
        ("groups.0.linear2", group, 20, 16),
        ("groups.0.linear3", group, 20, 16),
        ("groups.1.linear2", ["λ.loop"], 20, 16),
        ("groups.1.linear3", ["λ.loop"], 20, 16),
        ("heads.0.linear", ["left parity"], 5, 4),
        ("heads.1.linear", ["λ.loop"], 5, 4),
        ("heads.2.linear", ["at_least_5"], 5, 4),
    ]
    assert sharing["layers"][0]["shape"] == [4]
    assert sharing["layers"][0]["kind"] == "linear"
    by_macs = {"left parity": 8 + 16 + 4, "λ.loop": 8 + 32 + 4, "at_least_5": 8 + 16 + 4}
    assert sharing["macs_by_task"] == pytest.approx(by_macs)
    by_params = {"left parity": 28 / 3 + 20 + 5, "λ.loop": 28 / 3 + 40 + 5, "at_least_5": 28 / 3 + 20 + 5}
    assert sharing["params_by_task"] == pytest.approx(by_params)


@settings(max_examples=20)
@given(st.lists(st.integers(0, 2), min_size=3, max_size=3), st.integers(0, BACKBONE.units - 1))
def test_costs_by_task_add_up_to_the_whole(labels: list[int], split: int) -> None:
    network = build(Grouping.from_labels(labels), split)
    sharing, cost = describe(network), count_cost(network, BACKBONE.input_shape)
    for key, whole in (("macs", cost.macs), ("params", cost.params)):
        assert list(sharing[f"{key}_by_task"]) == list(TASKS.names)
        assert sum(sharing[f"{key}_by_task"].values()) == pytest.approx(whole)
        assert sum(layer[key] for layer in sharing["layers"]) == whole


def test_attention_costs_although_it_learns_nothing() -> None:
    layers = {layer["name"]: layer for layer in describe(filled(token_graph()))["layers"]}
    assert layers["attention"]["params"] == 0
    assert layers["attention"]["macs"] == 2 * 7 * 7 * 8
    assert "grid" not in layers


def test_loaded_weights_do_not_follow_the_file(folder: Path) -> None:
    loaded = load_architecture(folder)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    with (folder / WEIGHTS_FILE).open("r+b") as file:
        file.seek(-200, os.SEEK_END)
        file.write(bytes(200))
    assert_equal(loaded.state_dict(), before)


def test_weights_that_are_not_finite_come_back_as_they_are(tmp_path: Path) -> None:
    network = build()
    with torch.no_grad():
        network.get_parameter("heads.0.linear.bias").fill_(torch.nan)
    write(tmp_path, network)
    assert load_architecture(tmp_path).get_parameter("heads.0.linear.bias").isnan().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": float("nan")}, "JSON"),
        ({"value": float("inf")}, "JSON"),
        ({"outputs": "mine"}, "metadata: must not use"),
        ({"long": "x" * MAX_DOCUMENT_BYTES}, "must leave the document"),
        (
            {"preprocessing": Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3)},
            "must have 1 or 2 values, found 3",
        ),
        ({"tasks": TaskSet(TASKS[:2])}, "grouping|outputs: must be of the tasks"),
        ({"tasks": TaskSet(TASKS[::-1])}, "outputs: must be of the tasks"),
        ({"network": build().double()}, r"must be \('F32', .* found \('torch.float64'"),
        ({"network": StaticNetwork(Graph(input_shape=(2, 3), nodes=(), outputs={}))}, "outputs: must be"),
    ],
)
def test_what_could_not_be_loaded_is_not_written(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, IndexError), match=message):
        write(tmp_path, **{"grouping": None, **arguments})
    assert not list(tmp_path.iterdir())


def test_writing_again_replaces_and_leaves_nothing_else(folder: Path) -> None:
    write(folder, build(Grouping.apart(3), split=0))
    assert len(load_architecture(folder).get_submodule("groups")._modules) == 3
    assert sorted(path.name for path in folder.iterdir()) == [ARCHITECTURE_FILE, WEIGHTS_FILE]


@pytest.mark.parametrize("files_before", [0, 1])
def test_a_write_that_is_cut_short_leaves_the_old_network_or_a_clear_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, files_before: int
) -> None:
    replaced: list[Path] = []

    def replace(source: Path, target: Path) -> None:
        if len(replaced) == files_before:
            raise OSError("disk full")
        replaced.append(target)
        shutil.move(source, target)

    other = build()
    with torch.no_grad():
        other.get_parameter("heads.0.linear.weight").add_(1)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="disk full"):
        write(folder, other)
    assert sorted(path.name for path in folder.iterdir()) == [ARCHITECTURE_FILE, WEIGHTS_FILE]
    if files_before:
        with pytest.raises(ArchitectureError, match="checksum"):
            load_architecture(folder)
    else:
        expected = build().state_dict()["heads.0.linear.weight"]
        assert torch.equal(load_architecture(folder).get_parameter("heads.0.linear.weight"), expected)


def test_the_document_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def replace(source: Path, target: Path) -> None:
        seen.append(target.name)
        shutil.move(source, target)

    monkeypatch.setattr(os, "replace", replace)
    write(tmp_path)
    assert seen == [WEIGHTS_FILE, ARCHITECTURE_FILE]


def layer_of(document: Document, name: str) -> Document:
    [found] = [layer for layer in document["nodes"] if layer["name"] == name]
    return found  # type: ignore[no-any-return]


WRONG_DOCUMENTS: list[tuple[str, Callable[[Document], object], str]] = [
    ("another format", lambda d: d.update(format="other"), "with the format"),
    (
        "an earlier version",
        lambda d: d.update(version=1),
        "version: must be 2, found 1: load it with the rel",
    ),
    ("a later version", lambda d: d.update(version=3), "version: must be 2, found 3"),
    ("no version", lambda d: d.pop("version"), "version: must be 2, found None"),
    ("no tasks", lambda d: d.update(tasks=[]), "tasks: at least one"),
    ("tasks not a list", lambda d: d.update(tasks={"a": 1}), "tasks: must be there and of type list"),
    ("a task not an object", lambda d: d.update(tasks=["a"]), "tasks: must hold dict"),
    ("a task twice", lambda d: d["tasks"].append(d["tasks"][0]), "unique"),
    (
        "a task more",
        lambda d: d["tasks"].append({**d["tasks"][0], "name": "x"}),
        "outputs: must be of the tasks",
    ),
    ("an unknown kind of task", lambda d: d["tasks"][0].update(kind="nonsense"), "kind: of a task must be"),
    ("a task's name that is no text", lambda d: d["tasks"][0].update(name=5), "name: must be there"),
    ("endless outputs", lambda d: d["tasks"][4].update(outputs=10**12), "outputs: of a regression task"),
    ("other outputs", lambda d: d["tasks"][3].update(outputs=4), r"of shape \(4,\), found \(5,\)"),
    ("another way up", lambda d: d["tasks"][0].update(direction="maximize"), "tasks: must be as"),
    ("a weight that is no number", lambda d: d["tasks"][0].update(weight="1"), "weight: must be there"),
    ("a key too many", lambda d: d["tasks"][0].update(extra=1), "tasks: must be as"),
    ("an endless input", lambda d: d.update(input_shape=[8, 10**12]), "input_shape: must be"),
    ("an input of many axes", lambda d: d.update(input_shape=[1] * 100_000), "input_shape: must be"),
    ("no input", lambda d: d.update(input_shape=[]), "input_shape: must be"),
    ("an input of zero", lambda d: d.update(input_shape=[8, 0]), "input_shape: must be"),
    ("another input", lambda d: d.update(input_shape=[8, 10]), "'linear' can't take"),
    ("no preprocessing", lambda d: d.update(preprocessing=None), "preprocessing: must be there"),
    ("a std of zero", lambda d: d["preprocessing"].update(std=[0.0]), "std: must be finite and above 0"),
    ("a mean that is no number", lambda d: d["preprocessing"].update(mean=["a"]), "mean: must hold"),
    (
        "values for 3 of 8",
        lambda d: d.update(preprocessing={"mean": [0] * 3, "std": [1] * 3}),
        "1 or 8 values",
    ),
    ("a mean beyond any float", lambda d: d["preprocessing"].update(mean=[10**400]), "mean: must be finite"),
    ("no nodes", lambda d: d.update(nodes=[]), "outputs: must be nodes"),
    ("nodes not a list", lambda d: d.update(nodes={}), "nodes: must be there and of type list"),
    ("an unknown kind", lambda d: layer_of(d, "mix").update(kind="pickle"), "mix: kind: must be one of"),
    ("a kind that is no text", lambda d: layer_of(d, "mix").update(kind=["mix"]), "kind: must be there"),
    ("a name twice", lambda d: layer_of(d, "bn").update(name="conv"), "name: must be unique"),
    ("a name in another", lambda d: layer_of(d, "bn").update(name="conv.bn"), "name: must be unique"),
    ("a name of torch's", lambda d: layer_of(d, "bn").update(name="forward"), "no reserved word"),
    ("a name of ours", lambda d: layer_of(d, "bn").update(name="graph"), "no reserved word"),
    ("the name of the first layer", lambda d: layer_of(d, "bn").update(name="standardize"), "must be unique"),
    ("a long name", lambda d: layer_of(d, "bn").update(name="x" * (MAX_NAME + 1)), "at most 256 characters"),
    ("a cycle", lambda d: layer_of(d, "conv").update(inputs=["bn"]), "earlier nodes or 'input', found 'bn'"),
    (
        "itself",
        lambda d: layer_of(d, "conv").update(inputs=["conv"]),
        "earlier nodes or 'input', found 'conv'",
    ),
    (
        "an input too many",
        lambda d: layer_of(d, "bn")["inputs"].append("conv"),
        "must have 1 inputs, found 2",
    ),
    ("no inputs", lambda d: layer_of(d, "mix").update(inputs=[]), "must have one or more inputs"),
    ("an input that is no text", lambda d: layer_of(d, "bn").update(inputs=[5]), "inputs: must hold str"),
    (
        "a setting too many",
        lambda d: layer_of(d, "bn")["settings"].update(eps=1),
        "settings: 'batch_norm' must",
    ),
    ("a setting too few", lambda d: layer_of(d, "bn")["settings"].clear(), "settings: 'batch_norm' must"),
    (
        "an endless setting",
        lambda d: layer_of(d, "bn")["settings"].update(channels=10**12),
        "whole number from 1",
    ),
    ("a negative setting", lambda d: layer_of(d, "some")["settings"].update(start=-1), "whole number from 0"),
    ("a fraction", lambda d: layer_of(d, "bn")["settings"].update(channels=6.0), "must be a whole number"),
    (
        "a slice beyond the end",
        lambda d: layer_of(d, "some")["settings"].update(start=9),
        "'slice' can't take",
    ),
    (
        "a layer that is not read",
        lambda d: d["nodes"].append({**layer_of(d, "max"), "name": "more"}),
        "must be read",
    ),
    ("another output", lambda d: d["outputs"].update(relu="vector.mix"), r"of shape \(5,\), found \(6,\)"),
    ("the input as output", lambda d: d["outputs"].update({"λ.depth": "input"}), "outputs: must be nodes"),
    ("an output that is no node", lambda d: d["outputs"].update(relu="nowhere"), "outputs: must be nodes"),
    ("an output that is no text", lambda d: d["outputs"].update(relu=["mix"]), "outputs: must be nodes"),
    (
        "outputs in another order",
        lambda d: d["outputs"].update(relu=d["outputs"].pop("relu")),
        "of the tasks",
    ),
    ("weights not an object", lambda d: d.update(weights="here"), "weights: must be there"),
    ("another file", lambda d: d["weights"].update(file="../secret"), "file: must be 'weights.safetensors'"),
    ("another checksum", lambda d: d["weights"].update(sha256="0" * 64), "must have the checksum 000"),
]


@pytest.mark.parametrize(
    ("change", "message"),
    [pytest.param(change, message, id=name) for name, change, message in WRONG_DOCUMENTS],
)
def test_a_document_that_is_wrong_is_refused(
    by_hand: Path, change: Callable[[Document], object], message: str
) -> None:
    rewrite(by_hand, change)
    with pytest.raises(ArchitectureError, match=message):
        load_architecture(by_hand)


JSON_VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 20),
        st.sampled_from([2**28, 2**28 + 1, 2**31, 2**63, -(2**63), 10**30, 1e308, -0.0, 0.5]),
        st.sampled_from(
            ["", "input", "mix", "conv", "binary", "segmentation", "a.b", "λ", "\ud800", "x" * 300]
        ),
        st.sampled_from(sorted(KINDS)),
    ),
    lambda values: (
        st.lists(values, max_size=3) | st.dictionaries(st.sampled_from(["name", "a"]), values, max_size=2)
    ),
    max_leaves=6,
)


def mutate(document: Document, data: st.DataObject) -> None:
    """Change something at a random place of a JSON document."""
    place: Any = document
    likely = [key for key in ("tasks", "nodes", "nodes", "nodes", "outputs") if key in document]
    key: Any = data.draw(st.sampled_from([*likely, *document]))
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.integers(0, 9)):
        place = place[key]
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
    match data.draw(st.sampled_from(["replace", "delete", "repeat", "swap", "near"])):
        case "replace":
            place[key] = data.draw(JSON_VALUES)
        case "delete":
            del place[key]
        case "repeat" if isinstance(place, list):
            place.insert(data.draw(st.integers(0, len(place))), json.loads(json.dumps(place[key])))
        case "swap":
            other = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
            place[key], place[other] = place[other], place[key]
        case "near" if type(place[key]) is int:
            place[key] += data.draw(st.integers(-2, 2))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_document_changed_at_random_is_refused_or_gives_a_network_that_runs(
    by_hand: Path, written_by_hand: Path, data: st.DataObject
) -> None:
    document = read(written_by_hand)
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(document, data)
    (by_hand / ARCHITECTURE_FILE).write_text(json.dumps(document))
    try:
        loaded = load_architecture(by_hand)
    except ArchitectureError:
        return
    outputs = loaded(torch.zeros(3, *loaded.graph.input_shape))
    assert list(outputs) == [task["name"] for task in document["tasks"]]


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
    folder: Path, written: Path, data: st.DataObject
) -> None:
    content = (written / WEIGHTS_FILE).read_bytes()
    cut = content[: data.draw(st.integers(0, len(content) - 1))]
    (folder / WEIGHTS_FILE).write_bytes(cut)
    with pytest.raises(ArchitectureError, match="checksum"):
        load_architecture(folder)
    replace_weights(folder, cut)
    with pytest.raises(ArchitectureError):
        load_architecture(folder)


@SHARED_FOLDER
@given(st.data())
def test_any_flipped_byte_of_the_weights_is_noticed(folder: Path, written: Path, data: st.DataObject) -> None:
    content = bytearray((written / WEIGHTS_FILE).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (folder / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(ArchitectureError, match="checksum"):
        load_architecture(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("heads.0.linear.bias"), r"heads.0.linear.bias: must be .* found None"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra: must be None, found"),
        (lambda s: s.update({"standardize.mean": torch.zeros(1)}), "standardize.mean: must be None, found"),
        (lambda s: s.update({"bn.bias": torch.zeros(2)}), r"bn.bias: must be .*\(6,\)\), found"),
        (lambda s: s.update({"bn.bias": torch.zeros(6).double()}), "bn.bias: must be .* found .*F64"),
        (lambda s: s.update({"bn.bias": torch.zeros(6).bfloat16()}), "bn.bias: must be .* found .*BF16"),
        (lambda s: s.update({"picked.index": torch.zeros(5)}), "picked.index: must be .*I64.* found .*F32"),
        (lambda s: s["picked.index"].fill_(12), "picked: index must be from 0 to 11, found 12 to 12"),
        (lambda s: s["picked.index"][0].fill_(-1), "picked: index must be from 0 to 11, found -1"),
        (lambda s: s["mix.index"][3].fill_(9), "mix: index must be from 0 to 8, found . to 9"),
        (lambda s: s["vector.picked.index"].fill_(2**62), "vector.picked: index must be from 0 to 3"),
        (lambda s: s.clear(), "must be .* found None"),
    ],
)
def test_weights_of_another_network_are_refused(
    by_hand: Path, change: Callable[[State], object], message: str
) -> None:
    state = filled(map_graph()).state_dict()
    change(state)
    replace_weights(by_hand, safetensors.torch.save(state))
    with pytest.raises(ArchitectureError, match=message):
        load_architecture(by_hand)


def test_a_number_of_a_token_network_is_held_against_its_last_axis(tmp_path: Path) -> None:
    network = filled(token_graph())
    network.get_buffer("picked.index").fill_(8)
    one = Preprocessing(mean=(0.0,), std=(1.0,))
    with pytest.raises(ValueError, match="picked: index must be from 0 to 7, found 8"):
        write(tmp_path, network, tasks=TOKEN_TASKS, grouping=None, preprocessing=one)


def layer(name: str, kind: str, source: str, **sizes: int) -> Document:
    return {"name": name, "kind": kind, "inputs": [source], "settings": sizes}


HUGE = 2**28
HOSTILE_NODES = {
    "a huge square": [layer("a", "linear", "input", inputs=HUGE, outputs=HUGE)],
    "more weights than numbers": [layer("a", "random_conv", "input", channels=HUGE, kernel=HUGE)],
    "a huge convolution": [layer("a", "conv", "input", inputs=HUGE, outputs=HUGE, kernel=HUGE)],
    "a wide layer": [layer("a", "linear", "input", inputs=3, outputs=HUGE)],
    "a huge map": [layer("a", "image", "input"), layer("b", "upsample", "a", height=HUGE, width=HUGE)],
    "a map beyond the limit": [
        layer("a", "image", "input"),
        layer("b", "upsample", "a", height=2**15, width=2**15),
    ],
    "a huge padding": [
        layer("a", "image", "input"),
        layer("b", "random_conv", "a", channels=1, kernel=1, padding=HUGE),
    ],
    "many tokens": [layer("a", "class_token", "input", tokens=HUGE, channels=HUGE)],
    "many channels": [layer("a", "mix", "input", channels=HUGE, parts=HUGE)],
    "many numbers": [layer("a", "select", "input", count=HUGE)],
    "many modules": [layer(f"{n}." + "a." * 100 + "a", "relu", "input") for n in range(MAX_MODULES // 100)],
    "a deep name": [layer("a." * 2**22 + "a", "relu", "input")],
}
MEASURE = """
import json, resource, sys
import torch
from pathlib import Path
from coterie.models.export import ArchitectureError, load_architecture

good, *others = map(Path, sys.argv[1:])
load_architecture(good)(torch.zeros(1, 2, 3))  # what is imported and allocated once is there now
growth = {}
for folder in others:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        load_architecture(folder)
    except ArchitectureError:
        growth[folder.name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
modules = set(sys.modules)
print(json.dumps({"growth": growth, "modules": sorted(modules)}))
"""
MOST_GROWTH_KIB = 64 * 1024  # a quarter of the smallest thing that the hostile files ask for


def test_a_hostile_file_takes_no_memory_and_loading_no_training_code(tmp_path: Path, written: Path) -> None:
    for name, nodes in HOSTILE_NODES.items():
        folder = shutil.copytree(written, tmp_path / name)
        outputs = dict.fromkeys(TASKS.names, nodes[-1]["name"])
        rewrite(folder, lambda d, nodes=nodes, outputs=outputs: d.update(nodes=nodes, outputs=outputs))  # type: ignore[misc]
    for name, shape in {"a header of 4 TiB": [2**40], "a header that overflows": [2**40, 2**40]}.items():
        folder = shutil.copytree(written, tmp_path / name)
        tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, 2**42]}
        header = json.dumps({"heads.0.linear.weight": tensor}).encode()
        replace_weights(folder, len(header).to_bytes(8, "little") + header)
    hostile = sorted(tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(written), *map(str, hostile)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert list(found["growth"]) == [folder.name for folder in hostile]
    assert max(found["growth"].values()) < MOST_GROWTH_KIB, found["growth"]
    baggage = (
        "coterie.models.families",
        "coterie.models.heads",
        "torchmetrics",
        "torchjd",
        "onnx",
        "pydantic",
    )
    assert not [module for module in found["modules"] if module.startswith(baggage)]


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


def test_loading_never_unpickles(by_hand: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    load_architecture(by_hand)


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


SCHEMA_SEES: list[tuple[str, Callable[[Document], object]]] = [
    ("another version", lambda d: d.update(version=1)),
    ("no tasks", lambda d: d.update(tasks=[])),
    ("a metric of another kind", lambda d: d["tasks"][0].update(metric="miou")),
    ("a loss of another kind", lambda d: d["tasks"][0].update(loss="l1")),
    ("two outputs of a binary task", lambda d: d["tasks"][0].update(outputs=2)),
    ("a grouping that is no list", lambda d: d.update(grouping="all")),
    ("an input of zero", lambda d: d.update(input_shape=[0])),
    ("a std of zero", lambda d: d["preprocessing"].update(std=[0])),
    ("an unknown layer", lambda d: layer_of(d, "mix").update(kind="pickle")),
    ("a name with a space", lambda d: layer_of(d, "mix").update(name="a b")),
    ("two inputs of one", lambda d: layer_of(d, "bn")["inputs"].append("conv")),
    ("no input of some", lambda d: layer_of(d, "mix").update(inputs=[])),
    ("one input of two", lambda d: layer_of(d, "add")["inputs"].pop()),
    ("an unknown setting", lambda d: layer_of(d, "bn")["settings"].update(eps=1)),
    ("a setting of nothing", lambda d: layer_of(d, "relu")["settings"].update(channels=1)),
    ("a missing setting", lambda d: layer_of(d, "bn")["settings"].clear()),
    ("a setting of zero", lambda d: layer_of(d, "bn")["settings"].update(channels=0)),
    ("a bias of 1", lambda d: layer_of(d, "conv")["settings"].update(bias=1)),
    ("an output that is no name", lambda d: d["outputs"].update(relu=5)),
    ("negative macs", lambda d: d["cost"].update(macs=-1)),
    ("a layer without tasks", lambda d: d["sharing"]["layers"][0].pop("tasks")),
    ("half a checksum", lambda d: d["weights"].update(sha256="00")),
]


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in SCHEMA_SEES])
def test_the_schema_refuses_what_is_broken(by_hand: Path, change: Callable[[Document], object]) -> None:
    document = read(by_hand)
    jsonschema.validate(document, SCHEMA)
    change(document)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, SCHEMA)


@pytest.mark.parametrize("key", [key for key in SCHEMA["required"] if key not in {"grouping"}])
def test_the_schema_wants_every_key(by_hand: Path, key: str) -> None:
    document = read(by_hand)
    del document[key]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, SCHEMA)


def test_the_schema_knows_every_layer_and_its_settings() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    definitions = SCHEMA["$defs"]
    assert definitions["kind"]["enum"] == list(KINDS) == list(definitions["kinds"])
    by_kind = [entry["if"]["properties"]["kind"]["const"] for entry in definitions["node"]["allOf"]]
    assert by_kind == list(KINDS)
    for kind, entry in definitions["kinds"].items():
        rule = entry["properties"]["settings"]
        assert list(rule.get("properties", {})) == list(settings_of(kind)), kind
        sizes = dict.fromkeys(rule.get("required", ()), 1)
        check_layer(kind, sizes)  # it takes what the schema takes,
        for name in sizes:  # and wants what the schema wants
            with pytest.raises(ValueError, match="settings: "):
                check_layer(kind, {key: size for key, size in sizes.items() if key != name})


def test_the_schema_knows_every_kind_of_task() -> None:
    task = SCHEMA["$defs"]["task"]
    assert task["properties"]["kind"]["enum"] == [kind.value for kind in TaskKind]
    for entry, kind in zip(task["allOf"], TaskKind, strict=True):
        rules = entry["then"]["properties"]
        assert entry["if"]["properties"]["kind"]["const"] == kind
        assert rules["metric"]["enum"] == list(KIND_METRICS[kind])
        assert rules["loss"]["enum"] == list(KIND_LOSSES[kind])
