"""A static network on disk: `architecture.json` says what it is, `weights.safetensors` holds its numbers."""

import hashlib
import json
import os
import reprlib
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from coterie.models.backbones import BACKBONES
from coterie.models.cost import count_cost, count_macs
from coterie.models.static import GroupedNetwork
from coterie.models.tasks import Direction, Grouping, Task, TaskKind, TaskSet

ARCHITECTURE_FILE = "architecture.json"
WEIGHTS_FILE = "weights.safetensors"
FORMAT = "coterie-architecture"
FORMAT_VERSION = 1

MAX_DOCUMENT_BYTES = 16 * 2**20  # thousands of times a real one: keeps a wrong file from filling the memory

DTYPES = {torch.float32: "F32"}  # torch's name of a type -> safetensors' name


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


class Standardize(nn.Module):
    """Turn raw inputs into what a network was trained on: `(x - mean) / std`, [B, *input_shape] -> the same.

    Raises:
        ValueError: If there is neither one value nor one for each index of a sample's first axis.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, preprocessing: Preprocessing, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        values = len(preprocessing.mean)
        if values not in {1, input_shape[0]}:
            raise ValueError(f"preprocessing: must have 1 or {input_shape[0]} values, found {values}")
        shape = (values,) + (1,) * (len(input_shape) - 1)
        self.register_buffer("mean", torch.tensor(preprocessing.mean, dtype=torch.float32).view(shape))
        self.register_buffer("std", torch.tensor(preprocessing.std, dtype=torch.float32).view(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Give `(x - mean) / std`."""
        return (x - self.mean) / self.std


def write_architecture(
    folder: Path,
    network: GroupedNetwork,
    *,
    family: str,
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
        preprocessing: What `load_architecture` does to raw inputs first.
        metadata: Keys to add, such as metrics and seed: finite JSON values.

    Raises:
        ValueError: If `metadata` uses a key of the format or is not finite JSON, or the preprocessing does
            not fit the network's input.
        OSError: If a file can't be written.
    """
    Standardize(preprocessing, network.backbone.input_shape)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    weights = safetensors.torch.save(state)
    cost = count_cost(network, network.backbone.input_shape)
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "family": family,
        "tasks": [
            {
                "name": task.name,
                "kind": task.kind.value,
                "outputs": task.outputs,
                "metric": task.metric,
                "direction": task.direction.value,
                "weight": task.weight,
            }
            for task in network.tasks
        ],
        "grouping": network.grouping.names(network.tasks),
        "backbone": network.backbone.to_dict(),
        "split": network.split,
        "preprocessing": {"mean": list(preprocessing.mean), "std": list(preprocessing.std)},
        "cost": {"macs": cost.macs, "params": cost.params},
        "sharing": describe_sharing(network),
        "weights": {"file": WEIGHTS_FILE, "sha256": hashlib.sha256(weights).hexdigest()},
        "versions": {"coterie": version("coterie"), "torch": str(torch.__version__)},
    }
    if taken := document.keys() & metadata.keys():
        raise ValueError(f"metadata: must not use the keys of the format, found {sorted(taken)}")
    document.update(metadata)
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    _replace(folder / WEIGHTS_FILE, weights)
    _replace(folder / ARCHITECTURE_FILE, f"{text}\n".encode())
    return document


def describe_sharing(network: GroupedNetwork) -> dict[str, Any]:
    """Say who uses what: units, tasks and macs of the prefix and of each branch, and macs by task.

    A shared part's macs are split evenly among its tasks, so that `macs_by_task` adds up to the whole.
    """
    macs = count_macs(network, network.backbone.input_shape)
    names = network.tasks.names
    macs_by_task = {name: macs["prefix"] / len(names) + macs[f"heads.{t}"] for t, name in enumerate(names)}
    branches = []
    for k, group in enumerate(network.grouping.names(network.tasks)):
        branch_macs = macs[f"branches.{k}"]
        branches.append(
            {"tasks": group, "units": network.backbone.units - network.split, "macs": branch_macs}
        )
        for name in group:
            macs_by_task[name] += branch_macs / len(group)
    prefix = {"tasks": list(names), "units": network.split, "macs": macs["prefix"]}
    return {"prefix": prefix, "branches": branches, "macs_by_task": macs_by_task}


def load_architecture(folder: Path) -> nn.Module:
    """Load what `write_architecture` wrote, as a plain module in eval mode on the CPU.

    Nothing is unpickled, and no size that the document declares is allocated before the header of the
    weights' file was found to have it.

    Args:
        folder: Where `write_architecture` wrote to.

    Returns:
        A module from *raw* inputs [B, *input_shape] to {task name: logits}; it standardises by itself.

    Raises:
        ArchitectureError: If a file is missing, damaged, of another version, or the two do not fit.
    """
    try:
        document = _read_document(folder / ARCHITECTURE_FILE)
        description = _describe_network(document)
        standardize = Standardize(_read_preprocessing(document), description["backbone"].input_shape)
        sha256 = _member(_member(document, "weights", dict), "sha256", str)
        state = _read_weights(folder / WEIGHTS_FILE, sha256, description)
    except (OSError, RecursionError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise ArchitectureError(f"{folder}: {error}") from error
    network = GroupedNetwork.from_state(state, **description)
    return nn.Sequential(OrderedDict(standardize=standardize, network=network)).eval()


def _read_document(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        text = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(text) > MAX_DOCUMENT_BYTES:
        raise ValueError(f"{path.name}: must be at most {MAX_DOCUMENT_BYTES} bytes long")
    document = json.loads(text, parse_constant=_refuse_constant)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path.name}: must be a JSON object with the format {FORMAT!r}")
    if document.get("version") != FORMAT_VERSION:
        raise ValueError(f"version: must be {FORMAT_VERSION}, found {document.get('version')!r}")
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{ARCHITECTURE_FILE}: must be JSON, which has no {name}")


def _describe_network(document: dict[str, Any]) -> dict[str, Any]:
    """Read the arguments of `GroupedNetwork` from a document."""
    tasks = TaskSet([_read_task(entry) for entry in _member(document, "tasks", list)])
    configuration = _member(document, "backbone", dict)
    name = _member(configuration, "name", str)
    if name not in BACKBONES:
        raise ValueError(f"backbone: must be one of {sorted(BACKBONES)}, found {name!r}")
    backbone = BACKBONES[name].from_dict(configuration)
    grouping = Grouping.from_names(_member(document, "grouping", list), tasks)
    split = _member(document, "split", int)
    return {"backbone": backbone, "tasks": tasks, "grouping": grouping, "split": split}


def _read_task(entry: Any) -> Task:
    if not isinstance(entry, dict):
        raise ValueError(f"tasks: each must be an object, found {reprlib.repr(entry)}")
    return Task(
        name=_member(entry, "name", str),
        kind=TaskKind(_member(entry, "kind", str)),
        outputs=_member(entry, "outputs", int),
        metric=_member(entry, "metric", str),
        direction=Direction(_member(entry, "direction", str)),
        weight=_member(entry, "weight", int, float),
    )


def _read_preprocessing(document: dict[str, Any]) -> Preprocessing:
    values = _member(document, "preprocessing", dict)
    return Preprocessing(mean=tuple(_member(values, "mean", list)), std=tuple(_member(values, "std", list)))


def _member(document: dict[str, Any], key: str, *types: type) -> Any:
    """Give a member of a JSON object, which must be there and of one of the types."""
    value = document.get(key)
    if not isinstance(value, types):
        expected = " or ".join(kind.__name__ for kind in types)
        raise ValueError(f"{key}: must be there and of type {expected}, found {reprlib.repr(value)}")
    return value


def _read_weights(path: Path, sha256: str, description: dict[str, Any]) -> dict[str, Tensor]:
    """Read the tensors of the described network, after the file was found to hold these and no others."""
    with path.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{path.name}: must have the checksum {sha256}, found {found}")
    with safetensors.safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in list(file.keys())}
        shapes = {name: (entry.get_dtype(), tuple(entry.get_shape())) for name, entry in slices.items()}
        expected = _expected_shapes(description, limit=len(shapes))
        for name in sorted(shapes.keys() | expected.keys()):
            if shapes.get(name) != expected.get(name):
                raise ValueError(f"{name}: must be {expected.get(name)}, found {shapes.get(name)}")
        # A copy: what safetensors gives is a view of the file, and changes with it.
        return {name: file.get_tensor(name).clone() for name in shapes}


def _expected_shapes(description: dict[str, Any], *, limit: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Give type and shape of the described network's tensors, if there can be at most `limit` of them.

    Every unit and every head has a parameter, so a network of more parts than that is not even sketched.
    """
    units, split = description["backbone"].units, description["split"]
    parts = split + len(description["grouping"]) * (units - split) + len(description["tasks"])
    if parts > limit:
        raise ValueError(f"{WEIGHTS_FILE}: must hold {parts} tensors or more, found {limit}")
    sketch = GroupedNetwork.empty(**description)
    return {name: (DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in sketch.state_dict().items()}


def _replace(path: Path, content: bytes) -> None:
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
