import json
import os
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from coterie.models import convert
from coterie.models.backbones import MLP, ResNet20
from coterie.models.convert import ONNX_OPSET, main, write_onnx, write_pt2
from coterie.models.export import Preprocessing, load_architecture, write_architecture
from coterie.models.families import Grouped
from coterie.models.graph import node
from coterie.models.static import Graph, StaticNetwork
from coterie.models.tasks import Task, TaskKind, TaskSet
from tests.models.networks import MAP_TASKS, TOKEN_TASKS, filled, map_graph, token_graph

WRITERS = {"onnx": write_onnx, "pt2": write_pt2}
SIZES = (1, 5)


def residual_network() -> StaticNetwork:
    tasks = TaskSet(
        [
            Task(name="a", kind=TaskKind.BINARY),
            Task(name="b", kind=TaskKind.MULTICLASS, outputs=3),
            Task(name="c", kind=TaskKind.NORMALS, outputs=3),
        ]
    )
    torch.manual_seed(0)
    backbone = ResNet20(input_shape=(3, 8, 8), width=0.125)
    return Grouped(backbone=backbone, tasks=tasks, grouping=[["a", "b"], ["c"]], split=8).prune()


def small_network() -> StaticNetwork:
    nodes = (node("linear", "linear", "input", inputs=2, outputs=1),)
    return filled(Graph(input_shape=(2,), nodes=nodes, outputs={"a": "linear"}))


def assert_close(found: dict[str, torch.Tensor], network: StaticNetwork, x: torch.Tensor) -> None:
    with torch.no_grad():
        expected = network(x)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def run_onnx(path: Path, x: torch.Tensor) -> dict[str, torch.Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    [source] = session.get_inputs()
    values = session.run(names, {source.name: np.asarray(x)})
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(residual_network, id="a residual network"),
        pytest.param(lambda: filled(map_graph()), id="every kind of map layer"),
        pytest.param(lambda: filled(token_graph()), id="every kind of token layer"),
    ],
)
def test_both_forms_give_the_networks_outputs_for_any_batch(
    tmp_path: Path, build: Callable[[], StaticNetwork]
) -> None:
    network = build()
    write_onnx(network, tmp_path / "network.onnx")
    write_pt2(network, tmp_path / "network.pt2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["network.onnx", "network.pt2"]
    program = torch.export.load(tmp_path / "network.pt2").module()
    for batch in SIZES:
        x = torch.randn(batch, *network.graph.input_shape)
        assert_close(run_onnx(tmp_path / "network.onnx", x), network, x)
        assert_close(program(x), network, x)


def test_the_onnx_file_is_valid_and_named_for_its_reader(tmp_path: Path) -> None:
    path = tmp_path / "network.onnx"
    write_onnx(filled(map_graph()), path)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", ONNX_OPSET)]
    [source] = model.graph.input
    assert source.name == "input_"  # a task is called `input`
    assert [output.name for output in model.graph.output] == list(MAP_TASKS.names)
    for value in (source, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_the_files_name_no_folder_of_the_machine_that_made_them(tmp_path: Path) -> None:
    network = filled(token_graph())
    for form, writer in WRITERS.items():
        writer(network, tmp_path / f"network.{form}")
    contents = [(tmp_path / "network.onnx").read_bytes()]
    with zipfile.ZipFile(tmp_path / "network.pt2") as archive:
        contents += [archive.read(name) for name in archive.namelist()]
    for folder in (Path(convert.__file__).parent, Path(torch.__file__).parent, tmp_path):
        assert not any(os.fsencode(folder) in content for content in contents)


@pytest.mark.parametrize("form", WRITERS)
def test_the_network_itself_is_left_as_it_is_and_nothing_is_said(
    tmp_path: Path, form: str, capfd: pytest.CaptureFixture[str]
) -> None:
    network = filled(token_graph()).train()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        WRITERS[form](network, tmp_path / "network")
    assert [str(warning.message) for warning in said] == []
    assert capfd.readouterr() == ("", "")
    assert network.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("form", WRITERS)
def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError("disk full")

    path = tmp_path / "network"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        WRITERS[form](small_network(), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_weights_beyond_one_onnx_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "MAX_ONNX_BYTES", 100)
    with pytest.raises(ValueError, match="network: must have at most 100 bytes of weights for ONNX, found"):
        write_onnx(filled(token_graph()), tmp_path / "network.onnx")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("architecture")
    write_architecture(
        folder,
        filled(token_graph()),
        family="grouped",
        tasks=TOKEN_TASKS,
        backbone=MLP(input_shape=(3,), width=1, depth=1),
        grouping=None,
        preprocessing=Preprocessing(mean=(4.0,), std=(0.5,)),
        metadata={},
    )
    return folder


RUN_WITHOUT_COTERIE = """
import json, sys
import torch

outputs = torch.export.load(sys.argv[1]).module()(torch.full((3, 3, 8, 12), 5.0))
assert not any(module.startswith("coterie") for module in sys.modules)
print(json.dumps({name: tensor.flatten().tolist() for name, tensor in outputs.items()}))
"""


def test_the_command_makes_a_file_that_takes_raw_inputs_and_needs_no_coterie(
    folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "network.pt2"
    command = [sys.executable, "-m", "coterie.models.convert", str(folder), "pt2", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    command = [sys.executable, "-c", RUN_WITHOUT_COTERIE, str(path)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    with torch.no_grad():
        expected = load_architecture(folder)(torch.full((3, 3, 8, 12), 5.0))
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(torch.tensor(found[name]), tensor.flatten())


def test_the_command_converts_to_onnx(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "network.onnx"
    assert main([str(folder), "onnx", str(path)]) == 0
    x = torch.randn(5, 3, 8, 12)
    assert_close(run_onnx(path, x), load_architecture(folder), x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: "),
        (["{folder}", "pickle", "{out}"], "usage: "),
        (["{folder}", "onnx", "{out}", "more"], "usage: "),
        (["{out}", "onnx", "{out}"], "architecture.json"),
        (["{folder}", "pt2", "{out}/no/such/folder"], "No such file"),
    ],
)
def test_a_fault_of_the_arguments_is_one_line(
    folder: Path, tmp_path: Path, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([part.format(folder=folder, out=tmp_path) for part in arguments]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
