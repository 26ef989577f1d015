"""A static network on disk: `architecture.json` says what it is, `weights.safetensors` holds its numbers.

`architecture.schema.json`, beside this file, is the JSON Schema of the first.
"""

import hashlib
import json
import math
import os
import reprlib
import textwrap
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from coterie.models.backbones import Backbone
from coterie.models.cost import macs_by_node
from coterie.models.graph import INPUT, Node
from coterie.models.static import Graph, StaticNetwork
from coterie.models.tasks import DENSE, Grouping, Task, TaskKind, TaskSet

ARCHITECTURE_FILE = "architecture.json"
WEIGHTS_FILE = "weights.safetensors"
FORMAT = "coterie-architecture"
FORMAT_VERSION = 2

# Far above any useful network: they keep a damaged file from asking for an endless one.
MAX_DOCUMENT_BYTES = 16 * 2**20
MAX_MODULES = 2**15  # layers, and what their names' parts before a dot stand for
MAX_NAME = 256  # characters of a layer's name
MAX_AXES = 8  # of an input
MAX_VALUES = 2**28  # numbers that one layer gives for one sample

MESSAGE_LENGTH = 1000  # of an error: it quotes the file
LINE_LENGTH = 200  # of the document, so that a layer is a line

DTYPES = {torch.float32: "F32", torch.int64: "I64"}  # torch's name of a type -> safetensors' name
STANDARDIZE = "standardize"  # the layer that a loaded network begins with


class ArchitectureError(ValueError):
    """A folder does not hold an architecture that can be loaded; the message names the file and the fault."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How raw inputs become the network's: `(x - mean) / std`.

    Attributes:
        mean: One value for all inputs, or one for each index of a sample's first axis.
        std: As many, above 0.

    Raises:
        ValueError: If they are empty, of different lengths, not finite in float32, or `std` is not above 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(
                "preprocessing: mean and std must be of the same length, from 1, "
                f"found {len(self.mean)} and {len(self.std)}"
            )
        limits = torch.finfo(torch.float32)
        if not all(abs(value) <= limits.max for value in self.mean):
            raise ValueError(f"mean: must be finite in float32, found {self.mean}")
        if not all(limits.tiny <= value <= limits.max for value in self.std):
            raise ValueError(f"std: must be finite and above 0 in float32, found {self.std}")


def write_architecture(
    folder: Path,
    network: StaticNetwork,
    *,
    family: str,
    tasks: TaskSet,
    backbone: Backbone,
    grouping: Grouping | None,
    preprocessing: Preprocessing,
    metadata: Mapping[str, Any],
) -> dict[str, Any]:
    """Write `network` into `folder`, which must exist, and give the document that describes it.

    Each file appears whole or not at all. The document comes last and holds the weights' checksum, so that a
    write that was cut short is seen when loading.

    Args:
        folder: Where to; files of an earlier call are replaced.
        network: What to write.
        family: How it was found.
        tasks: What it answers.
        backbone: What it was made of; for the reader, as the layers say all.
        grouping: Which tasks share, if they share by groups; for the reader.
        preprocessing: What `load_architecture` does to raw inputs first.
        metadata: Keys to add, such as metrics and seed: finite JSON values.

    Raises:
        ValueError: If `load_architecture` could not read it: `metadata` uses a key of the format or is not
            finite JSON, the preprocessing does not fit the input or the outputs the tasks, a tensor has
            another type than float32 or int64, or the network is beyond a limit. Nothing is written then.
        OSError: If a file can't be written.
    """
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "family": family,
        "tasks": [_describe_task(task) for task in tasks],
        "grouping": None if grouping is None else grouping.names(tasks),
        "backbone": backbone.to_dict(),
        "input_shape": list(network.graph.input_shape),
        "preprocessing": {"mean": list(preprocessing.mean), "std": list(preprocessing.std)},
        "nodes": [
            {
                "name": node.name,
                "kind": node.kind,
                "inputs": list(node.inputs),
                "settings": dict(node.settings),
            }
            for node in network.nodes
        ],
        "outputs": dict(network.graph.outputs),
    }
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    sketch, shapes = _sketch(document)
    _check_tensors({name: (_dtype(tensor), tuple(tensor.shape)) for name, tensor in state.items()}, sketch)
    _check_indices(state, sketch, shapes)
    weights = safetensors.torch.save(state)
    sharing = describe(network)
    document |= {
        "cost": {key: sum(layer[key] for layer in sharing["layers"]) for key in ("macs", "params")},
        "sharing": sharing,
        "weights": {"file": WEIGHTS_FILE, "sha256": hashlib.sha256(weights).hexdigest()},
        "versions": {"coterie": version("coterie"), "torch": str(torch.__version__)},
    }
    if taken := document.keys() & metadata.keys():
        raise ValueError(f"metadata: must not use the keys of the format, found {sorted(taken)}")
    document = json.loads(json.dumps({**document, **metadata}, allow_nan=False))
    text = f"{_format(document)}\n".encode()
    if len(text) > MAX_DOCUMENT_BYTES:
        raise ValueError(
            f"metadata: must leave the document at most {MAX_DOCUMENT_BYTES} bytes, found {len(text)}"
        )
    replace_file(folder / WEIGHTS_FILE, weights)
    replace_file(folder / ARCHITECTURE_FILE, text)
    return document


def describe(network: StaticNetwork) -> dict[str, Any]:
    """Say layer by layer which tasks use it and what it costs, and what that makes for each task.

    Returns:
        `layers`: a list of name, kind, tasks, shape (of its output, one sample's), params and macs. Layers
        that have neither learned numbers nor macs (activations, pooling, sums, reshaping, routing of
        channels) are left out. `macs_by_task` and `params_by_task`: what a layer has, split evenly among the
        tasks that use it, so that they add up to the whole.
    """
    users, shapes, macs = network.graph.users(), network.graph.shapes(), macs_by_node(network)
    params = {
        node.name: sum(parameter.numel() for parameter in network.layer(node.name).parameters())
        for node in network.nodes
    }
    layers = [
        {
            "name": node.name,
            "kind": node.kind,
            "tasks": list(users[node.name]),
            "shape": list(shapes[node.name]),
            "params": params[node.name],
            "macs": macs[node.name],
        }
        for node in network.nodes
        if params[node.name] or macs[node.name]
    ]
    return {
        "layers": layers,
        "macs_by_task": _by_task(macs, users, network.graph.outputs),
        "params_by_task": _by_task(params, users, network.graph.outputs),
    }


def load_architecture(folder: Path) -> StaticNetwork:
    """Load what `write_architecture` wrote, as a plain module in eval mode on the CPU.

    Nothing is unpickled, and no size that the document declares is allocated before the header of the
    weights' file was found to have it. Numbers that are not finite are loaded as they are.

    Args:
        folder: Where `write_architecture` wrote to.

    Returns:
        A module from *raw* inputs [B, *input_shape] to {task name: output}, as
        `coterie.models.heads.Head` describes outputs; its first layer standardises.

    Raises:
        ArchitectureError: If a file is missing, damaged, of another version, or the two do not fit.
    """
    try:
        document = _read_document(folder / ARCHITECTURE_FILE)
        network, shapes = _sketch(document)
        weights = _member(document, "weights", dict)
        if weights.get("file") != WEIGHTS_FILE:
            raise ValueError(f"file: must be {WEIGHTS_FILE!r}, found {reprlib.repr(weights.get('file'))}")
        state = _read_weights(folder / WEIGHTS_FILE, _member(weights, "sha256", str), network)
        _check_indices(state, network, shapes)
    except (OSError, RecursionError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise ArchitectureError(textwrap.shorten(f"{folder}: {error}", MESSAGE_LENGTH)) from error
    preprocessing = _read_preprocessing(document)
    for name in ("mean", "std"):
        buffer = network.get_buffer(f"{STANDARDIZE}.{name}")
        values = torch.tensor(getattr(preprocessing, name), dtype=torch.float32)
        state[f"{STANDARDIZE}.{name}"] = values.view(buffer.shape)
    network.load_state_dict(state, assign=True)
    return network.eval()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or as it was before, even after a power cut."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _by_task(
    costs: Mapping[str, int], users: Mapping[str, tuple[str, ...]], tasks: Iterable[str]
) -> dict[str, float]:
    """Split each layer's cost evenly among its users."""
    shares = dict.fromkeys(tasks, 0.0)
    for name, cost in costs.items():
        for task in users[name]:
            shares[task] += cost / len(users[name])
    return shares


def _describe_task(task: Task) -> dict[str, Any]:
    return {
        "name": task.name,
        "kind": task.kind.value,
        "outputs": task.outputs,
        "metric": task.metric,
        "direction": task.direction.value,
        "loss": task.loss,
        "weight": task.weight,
    }


def _format(value: Any, indent: str = "") -> str:
    """Write JSON for people: what fits on a line is on one, what does not has a line for each member."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or len(indent) + len(line) <= LINE_LENGTH:
        return line
    inner = f"{indent}  "
    if isinstance(value, list):
        members, (begin, end) = [_format(member, inner) for member in value], "[]"
    else:
        members, (begin, end) = [f"{_format(key)}: {_format(value[key], inner)}" for key in value], "{}"
    return f"{begin}\n{inner}" + f",\n{inner}".join(members) + f"\n{indent}{end}"


def _read_document(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        text = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(text) > MAX_DOCUMENT_BYTES:
        raise ValueError(f"{path.name}: must be at most {MAX_DOCUMENT_BYTES} bytes long")
    document = json.loads(text, parse_constant=_refuse_constant)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path.name}: must be a JSON object with the format {FORMAT!r}")
    if document.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"version: must be {FORMAT_VERSION}, found {reprlib.repr(document.get('version'))}: load it with "
            "the release that wrote it, which `versions` names, or run its trial again with this one"
        )
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{ARCHITECTURE_FILE}: must be JSON, which has no {name}")


def _sketch(document: dict[str, Any]) -> tuple[StaticNetwork, dict[str, tuple[int, ...]]]:
    """Build a document's network from raw inputs on, on the meta device, and give its layers' shapes."""
    tasks = TaskSet([_read_task(entry) for entry in _members(document, "tasks", dict)])
    graph = _standardized(_read_graph(document), _read_preprocessing(document))
    if tuple(graph.outputs) != tasks.names:
        raise ValueError(f"outputs: must be of the tasks {list(tasks.names)}, found {list(graph.outputs)}")
    shapes = graph.shapes()
    for name, shape in shapes.items():
        if math.prod(shape) > MAX_VALUES:
            raise ValueError(f"{name}: must give at most {MAX_VALUES} numbers a sample, found {shape}")
    for task in tasks:
        expected, found = _output_shape(task, graph.input_shape), shapes[graph.outputs[task.name]]
        if found != expected:
            raise ValueError(f"outputs: of {task.name!r} must be of shape {expected}, found {found}")
    for name, users in graph.users().items():
        if not users:
            raise ValueError(f"{name}: must be read for some task's answer, found none")
    return StaticNetwork.empty(graph), shapes


def _read_task(entry: dict[str, Any]) -> Task:
    kind = _member(entry, "kind", str)
    if kind not in {known.value for known in TaskKind}:
        raise ValueError(f"kind: of a task must be one of {list(map(str, TaskKind))}, found {kind!r}")
    task = Task(
        name=_member(entry, "name", str),
        kind=TaskKind(kind),
        outputs=_member(entry, "outputs", int),
        metric=_member(entry, "metric", str),
        loss=_member(entry, "loss", str),
        weight=_member(entry, "weight", int, float),
    )
    if entry != _describe_task(task):
        raise ValueError(f"tasks: must be as {_describe_task(task)}, found {reprlib.repr(entry)}")
    return task


def _read_graph(document: dict[str, Any]) -> Graph:
    input_shape = tuple(_members(document, "input_shape", int))
    if not 1 <= len(input_shape) <= MAX_AXES or min(input_shape) < 1 or math.prod(input_shape) > MAX_VALUES:
        raise ValueError(
            f"input_shape: must be 1 to {MAX_AXES} whole numbers from 1 with a product of at most "
            f"{MAX_VALUES}, found {reprlib.repr(input_shape)}"
        )
    nodes = tuple(_read_node(entry) for entry in _members(document, "nodes", dict))
    _check_modules(node.name for node in nodes)
    outputs = _member(document, "outputs", dict)
    names = {node.name for node in nodes}
    if not all(type(name) is str and name in names for name in outputs.values()):
        raise ValueError(f"outputs: must be nodes, found {reprlib.repr(outputs)}")
    return Graph(input_shape=input_shape, nodes=nodes, outputs=outputs)


def _read_node(entry: dict[str, Any]) -> Node:
    return Node(
        name=_member(entry, "name", str),
        kind=_member(entry, "kind", str),
        inputs=tuple(_members(entry, "inputs", str)),
        settings=_member(entry, "settings", dict),
    )


def _check_modules(names: Iterable[str]) -> None:
    """Check the names of the layers, and how many modules they ask for, before there is one."""
    modules: set[str] = set()
    for name in names:
        if len(name) > MAX_NAME:
            raise ValueError(f"name: must have at most {MAX_NAME} characters, found {reprlib.repr(name)}")
        parts = name.split(".")
        modules.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
        if len(modules) > MAX_MODULES:
            raise ValueError(f"nodes: must be at most {MAX_MODULES}, their names' first parts included")


def _read_preprocessing(document: dict[str, Any]) -> Preprocessing:
    values = _member(document, "preprocessing", dict)
    mean, std = (tuple(_members(values, name, int, float)) for name in ("mean", "std"))
    return Preprocessing(mean=mean, std=std)


def _standardized(graph: Graph, preprocessing: Preprocessing) -> Graph:
    """Put the layer that standardises before all others."""
    values = len(preprocessing.mean)
    if values not in {1, graph.input_shape[0]}:
        raise ValueError(f"preprocessing: must have 1 or {graph.input_shape[0]} values, found {values}")
    first = Node(STANDARDIZE, "standardize", (INPUT,), {"values": values, "axes": len(graph.input_shape)})
    others = (
        replace(node, inputs=tuple(STANDARDIZE if name == INPUT else name for name in node.inputs))
        for node in graph.nodes
    )
    return replace(graph, nodes=(first, *others))


def _output_shape(task: Task, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a task's answer for one sample, as `coterie.models.heads.Head` gives it."""
    places = input_shape[-2:] if task.kind in DENSE else ()
    return (task.outputs, *places) if task.outputs > 1 else places


def _read_weights(path: Path, sha256: str, network: StaticNetwork) -> dict[str, Tensor]:
    """Read the sketched network's tensors, after the file was found to hold these and no others."""
    with path.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{path.name}: must have the checksum {sha256}, found {found}")
    with safetensors.safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in list(file.keys())}
        _check_tensors(
            {name: (entry.get_dtype(), tuple(entry.get_shape())) for name, entry in slices.items()}, network
        )
        # A copy: what safetensors gives is a view of the file, and changes with it.
        return {name: file.get_tensor(name).clone() for name in slices}


def _check_tensors(found: Mapping[str, tuple[str, tuple[int, ...]]], network: StaticNetwork) -> None:
    """Check that tensors of these types and shapes are the sketched network's, but for the standardising."""
    expected = {
        name: (_dtype(tensor), tuple(tensor.shape))
        for name, tensor in network.state_dict().items()
        if not name.startswith(f"{STANDARDIZE}.")
    }
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(f"{name}: must be {expected.get(name)}, found {found.get(name)}")


def _dtype(tensor: Tensor) -> str:
    return DTYPES.get(tensor.dtype, str(tensor.dtype))


def _check_indices(
    state: Mapping[str, Tensor], network: StaticNetwork, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Check that layers which take or place channels by their numbers find them."""
    for node in network.nodes:
        if node.kind == "mix":
            channels = node.settings["channels"]
        elif node.kind == "select":
            shape = shapes[node.inputs[0]]
            channels = shape[-1] if len(shape) == 2 else shape[0]
        else:
            continue
        index = state[f"{node.name}.index"]
        if index.min() < 0 or index.max() >= channels:
            raise ValueError(
                f"{node.name}: index must be from 0 to {channels - 1}, "
                f"found {int(index.min())} to {int(index.max())}"
            )


def _members(document: dict[str, Any], key: str, *types: type) -> list[Any]:
    """Give a list in a JSON object, all of whose members must be of one of the types."""
    values: list[Any] = _member(document, key, list)
    for value in values:
        if type(value) not in types:
            raise ValueError(f"{key}: must hold {_names(types)}, found {reprlib.repr(value)}")
    return values


def _member(document: dict[str, Any], key: str, *types: type) -> Any:
    """Give a member of a JSON object, which must be there and of one of the types."""
    value = document.get(key)
    if type(value) not in types:
        raise ValueError(f"{key}: must be there and of type {_names(types)}, found {reprlib.repr(value)}")
    return value


def _names(types: Iterable[type]) -> str:
    return " or ".join(kind.__name__ for kind in types)
