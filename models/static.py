"""The static network that a trial ends with: plain layers, no gates, no groups to learn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from coterie.models.graph import INPUT, Chain, Layers, Node, infer_shapes

# Shapes: B batch.


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A static network as data.

    Attributes:
        input_shape: Of one sample.
        nodes: In an order in which each stands behind its inputs.
        outputs: Task name -> the node that answers it, in the tasks' order.
    """

    input_shape: tuple[int, ...]
    nodes: tuple[Node, ...]
    outputs: Mapping[str, str]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one sample's value at each node, `INPUT` included; allocates nothing.

        Raises:
            ValueError: If a layer can't take what it gets.
        """
        return infer_shapes(self.nodes, self.input_shape)

    def users(self) -> dict[str, tuple[str, ...]]:
        """The tasks whose answer reads each node, in the tasks' order."""
        tasks: dict[str, set[str]] = {node.name: set() for node in self.nodes}
        for task, output in self.outputs.items():
            tasks[output].add(task)
        for node in reversed(self.nodes):
            for name in node.inputs:
                if name != INPUT:
                    tasks[name] |= tasks[node.name]
        return {name: tuple(task for task in self.outputs if task in used) for name, used in tasks.items()}


class StaticNetwork(Layers):
    """A graph of layers with an answer for each task.

    Args:
        graph: What it consists of. The weights are fresh, drawn from torch's global generator.

    Raises:
        ValueError: If the graph is not allowed.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph.nodes, graph.outputs.values())
        self.graph = graph

    @classmethod
    def from_state(cls, graph: Graph, state: Mapping[str, Tensor]) -> Self:
        """Build the network around the tensors of `state`, without drawing or copying; in eval mode.

        Raises:
            ValueError: If the graph is not allowed.
            RuntimeError: If `state` does not fit, as in `nn.Module.load_state_dict`.
        """
        network = cls.empty(graph)
        network.load_state_dict(state, assign=True)
        return network.eval()

    @classmethod
    def empty(cls, graph: Graph) -> Self:
        """Build the network on the meta device: shapes without memory, nothing drawn."""
        with torch.device("meta"):
            return cls(graph)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Give each task's output: [B, *input_shape] -> {task name: ...}, in the tasks' order."""
        values = self.run(x)
        return {task: values[name] for task, name in self.graph.outputs.items()}


class Assembly:
    """Puts a static network together, node by node, around copies of trained weights.

    A layer without weights that does what an earlier one does is that one; what no task reads is left out.
    """

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        self._input_shape = input_shape
        self._nodes: list[Node] = []
        self._state: dict[str, Tensor] = {}
        self._known: dict[object, str] = {}

    def add(self, node: Node, state: Mapping[str, Tensor] | None = None) -> str:
        """Add a layer with its weights, by their names in the layer; give the name of its value's node."""
        key = (node.kind, node.inputs, tuple(sorted(node.settings.items())))
        if not state:
            if key in self._known:
                return self._known[key]
            self._known[key] = node.name
        self._nodes.append(node)
        for name, tensor in (state or {}).items():
            self._state[f"{node.name}.{name}"] = tensor.detach().clone()
        return node.name

    def chain(self, prefix: str, chain: Chain, source: str) -> str:
        """Add a chain as it is, each name behind `prefix`, reading `source`; give its output's name."""
        names = {INPUT: source}
        for node in chain.nodes:
            inputs = tuple(names[name] for name in node.inputs)
            renamed = Node(f"{prefix}.{node.name}", node.kind, inputs, node.settings)
            names[node.name] = self.add(renamed, chain.layer(node.name).state_dict())
        return names[chain.output]

    def chains(self, prefix: str, chains: Sequence[nn.Module], source: str) -> str:
        """Add chains one behind another."""
        for chain in chains:
            assert isinstance(chain, Chain)
            source = self.chain(prefix, chain, source)
        return source

    def finish(self, outputs: Mapping[str, str]) -> StaticNetwork:
        """Give the network with these outputs, in eval mode."""
        used = set(outputs.values())
        kept: list[Node] = []
        for node in reversed(self._nodes):
            if node.name in used:
                kept.append(node)
                used |= set(node.inputs)
        names = {node.name for node in kept}
        state = {key: value for key, value in self._state.items() if key.rpartition(".")[0] in names}
        graph = Graph(input_shape=self._input_shape, nodes=tuple(reversed(kept)), outputs=dict(outputs))
        return StaticNetwork.from_state(graph, state)
