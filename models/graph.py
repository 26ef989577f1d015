"""Networks as data: a graph of layers, and the modules that run one."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from coterie.models.layers import KINDS, Setting, build_layer, check_layer

INPUT = "input"
_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
# Attributes of `Layers` and of what is made of it, which a layer's name must not hide.
_OWN_NAMES = frozenset(
    {"nodes", "outputs", "output", "run", "layer", "graph", "reads", "empty", "from_state"}
)


@dataclass(frozen=True, slots=True)
class Node:
    """One layer in a graph.

    Attributes:
        name: Unique in its graph, parts joined by dots; its weights are saved under it.
        kind: A key of `coterie.models.layers.KINDS`.
        inputs: Names of earlier nodes, or `INPUT`.
        settings: As the kind takes them.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    settings: Mapping[str, Setting] = field(default_factory=dict)


def node(name: str, kind: str, *inputs: str, **settings: Setting) -> Node:
    """Write a `Node` in one line."""
    return Node(name, kind, inputs, settings)


class Layers(nn.Module):
    """The modules of some nodes, run in order; the weights of a node are saved under its name.

    Args:
        nodes: In an order in which each stands behind its inputs.
        outputs: The nodes whose values `run` gives; others are let go after their last use.

    Raises:
        ValueError: If a name or a layer is not allowed, a name comes twice, or an input is unknown.
    """

    def __init__(self, nodes: Iterable[Node], outputs: Iterable[str]) -> None:
        super().__init__()
        self.nodes = tuple(nodes)
        self.outputs = tuple(dict.fromkeys(outputs))
        check_nodes(self.nodes, self.outputs)
        last_use = {source: step for step, node in enumerate(self.nodes) for source in node.inputs}
        self._steps: list[tuple[nn.Module, Node, list[str]]] = []
        for step, node in enumerate(self.nodes):
            module = build_layer(node.kind, node.settings)
            _attach(self, node.name, module)
            over = [name for name in dict.fromkeys(node.inputs) if last_use[name] == step]
            self._steps.append((module, node, [name for name in over if name not in self.outputs]))

    def run(self, x: Tensor) -> dict[str, Tensor]:
        """Give the values of the output nodes, by name."""
        values = {INPUT: x}
        for module, node, over in self._steps:
            values[node.name] = module(*[values[name] for name in node.inputs])
            for name in over:
                del values[name]
        return {name: values[name] for name in self.outputs}

    def layer(self, name: str) -> nn.Module:
        """The module of a node."""
        return self.get_submodule(name)


class Chain(Layers):
    """Nodes with one output, the last of them: a unit of a backbone, a head.

    Without nodes it gives what it gets.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        super().__init__(nodes, [nodes[-1].name if nodes else INPUT])

    @property
    def output(self) -> str:
        """The name of the last node, or `INPUT`."""
        return self.outputs[0]

    def forward(self, x: Tensor) -> Tensor:
        """Give the last node's value."""
        return self.run(x)[self.output]


def check_nodes(nodes: Sequence[Node], outputs: Iterable[str]) -> None:
    """Check a graph before anything is allocated.

    Raises:
        ValueError: If a name or a layer is not allowed, a name comes twice, or an input is unknown.
    """
    seen = {INPUT}
    parents: set[str] = set()
    for node in nodes:
        parts = node.name.split(".")
        above = {".".join(parts[:end]) for end in range(1, len(parts))}
        if not _NAME.fullmatch(node.name) or _is_reserved(parts):
            raise ValueError(
                f"name: must be letters, digits, _ and dots, and no reserved word, found {node.name!r}"
            )
        if node.name in seen or node.name in parents or above & seen:
            raise ValueError(f"name: must be unique and no other's beginning, found {node.name!r}")
        try:
            check_layer(node.kind, node.settings)
        except ValueError as error:
            raise ValueError(f"{node.name}: {error}") from error
        expected = KINDS[node.kind].inputs
        if len(node.inputs) != expected if expected else not node.inputs:
            raise ValueError(
                f"{node.name}: {node.kind!r} must have {expected or 'one or more'} inputs, "
                f"found {len(node.inputs)}"
            )
        for name in node.inputs:
            if name not in seen:
                raise ValueError(f"{node.name}: inputs must be earlier nodes or {INPUT!r}, found {name!r}")
        seen.add(node.name)
        parents |= above
    for name in outputs:
        if name not in seen:
            raise ValueError(f"outputs: must be nodes, found {name!r}")


def infer_shapes(nodes: Sequence[Node], input_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Give the shape of one sample's value at each node, without allocating anything.

    Raises:
        ValueError: If a layer can't take what it gets; the message names it.
    """
    check_nodes(nodes, ())
    values = {INPUT: torch.empty(2, *input_shape, device="meta")}
    with torch.device("meta"), torch.no_grad():
        for node in nodes:
            try:
                module = build_layer(node.kind, node.settings).eval()
                value = module(*[values[name] for name in node.inputs])
            except (IndexError, RuntimeError, ValueError, TypeError) as error:
                shapes = [tuple(values[name].shape[1:]) for name in node.inputs]
                raise ValueError(f"{node.name}: {node.kind!r} can't take {shapes}: {error}") from error
            if value.dim() < 1 or value.shape[0] != 2 or 0 in value.shape:
                raise ValueError(f"{node.name}: leaves nothing of its input, found {tuple(value.shape)}")
            values[node.name] = value
    return {name: tuple(value.shape[1:]) for name, value in values.items()}


def _is_reserved(parts: Sequence[str]) -> bool:
    """Whether a name would hide an attribute of the modules that hold the layers."""
    hidden = any(part.startswith("_") or part == "training" or hasattr(nn.Module, part) for part in parts)
    return hidden or parts[0] in _OWN_NAMES


def _attach(root: nn.Module, name: str, module: nn.Module) -> None:
    *parents, last = name.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)
