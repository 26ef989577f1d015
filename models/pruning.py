"""Channel pruning of gated branches: the static network that computes only what some task reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coterie.models.graph import INPUT, Chain, Node, infer_shapes
from coterie.models.heads import Head, Necks
from coterie.models.layers import KINDS, Reach, Setting, channels_per_block
from coterie.models.static import Assembly

# Shapes: T tasks, R branches (the shared one, then one a task), C channels, N blocks of channels.

SHARED = 0  # the shared branch's number; task t has branch t + 1
DENSE_LAYERS = frozenset({"conv", "linear"})


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedGraph:
    """Branches of one form, joined by gates, as `coterie.models.families.interrogate.GatedTrunk` runs them.

    Attributes:
        shape: Of one sample of what they read.
        nodes: One branch's layers in order; the last one's value is gated.
        ends: The nodes behind which everything before is out of sight but for their values: units' outputs.
        layers: For each branch its modules, by node.
        gates: For each gated node which channels of each task are its own, [T, C], bool.
        mixing: For each gated node but the last one the share of each task in the shared branch, [T, C].
    """

    shape: tuple[int, ...]
    nodes: tuple[Node, ...]
    ends: tuple[str, ...]
    layers: Sequence[Mapping[str, nn.Module]]
    gates: Mapping[str, Tensor]
    mixing: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Value:
    """A value in an assembly.

    Attributes:
        name: Of its node.
        shape: Of one sample, were all channels there.
        layout: The channels that it holds, in their order.
    """

    name: str
    shape: tuple[int, ...]
    layout: tuple[int, ...]

    @classmethod
    def whole(cls, name: str, shape: tuple[int, ...]) -> "Value":
        """A value with all its channels in their natural order."""
        return cls(name, shape, tuple(range(_channels(shape))))


class PrunedAssembly:
    """An assembly whose values may lack channels or hold them in another order.

    Weights follow: a layer's rows stand in the order that its readers want, its columns in the order in which
    its input comes, so that nothing is moved back into place at run time.

    Args:
        assembly: Gets the nodes.
        device: Of the weights.
    """

    def __init__(self, assembly: Assembly, device: torch.device) -> None:
        self._assembly = assembly
        self._device = device
        self._cuts: dict[tuple[str, tuple[int, ...]], str] = {}

    def layer(
        self,
        name: str,
        node: Node,
        module: nn.Module,
        inputs: Sequence[Value],
        shape: tuple[int, ...],
        rows: tuple[int, ...] = (),
    ) -> Value:
        """Add a layer, cut to the channels of its inputs.

        Args:
            name: In the assembly.
            node: The whole layer.
            module: Its weights.
            inputs: Of one layout, where it has several.
            shape: Of one sample of the whole layer's value.
            rows: The output channels, in order, of a convolution or linear layer; all, if none are given.
                Other layers have no choice.
        """
        columns = inputs[0].layout
        dense = node.kind in DENSE_LAYERS
        rows = (rows or tuple(range(_channels(shape)))) if dense else _rows(node, inputs[0], shape)
        settings: dict[str, Setting] = dict(node.settings)
        if dense:
            settings |= {"inputs": len(columns), "outputs": len(rows)}
        elif "channels" in settings:
            settings["channels"] = len(rows)
        elif "heads" in settings:
            settings["heads"] = int(settings["heads"]) * len(rows) // _channels(shape)
        axis = 2 if node.kind == "class_token" else 0
        state = {
            key: _take(tensor, axis, rows) if tensor.dim() else tensor
            for key, tensor in module.state_dict().items()
        }
        if dense:
            state["weight"] = _take(state["weight"], 1, columns)
        added = Node(name, node.kind, tuple(value.name for value in inputs), settings)
        return Value(self._assembly.add(added, state), shape, rows)

    def head(self, t: int, head: Head, necks: Necks, source: Value) -> str:
        """Add the head of task t, behind its neck, reading a last unit's output; give its output's name."""
        neck = necks[head.reads]
        assert isinstance(neck, Chain)
        features = self._chain(f"tasks.{t}.neck", neck, source)
        return self._chain(f"heads.{t}", head, features).name

    def _chain(self, prefix: str, chain: Chain, source: Value) -> Value:
        """Add a chain that changes no channels' order beyond its first layer with weights."""
        shapes = infer_shapes(chain.nodes, source.shape)
        values = {INPUT: source}
        for node in chain.nodes:
            values[node.name] = self.layer(
                f"{prefix}.{node.name}",
                node,
                chain.layer(node.name),
                [values[name] for name in node.inputs],
                shapes[node.name],
            )
        return values[chain.output]

    def pick(self, value: Value, channels: tuple[int, ...]) -> Value:
        """Give these channels of a value in this order: itself if it is so, a view if they are a run."""
        if value.layout == channels:
            return value
        place = {channel: number for number, channel in enumerate(value.layout)}
        places = tuple(place[channel] for channel in channels)
        return Value(self._cut(value.name, places), value.shape, channels)

    def join(self, name: str, first: Value, second: Value) -> Value:
        """Put the channels of two values behind one another."""
        return Value(self._concat(name, first, second), first.shape, first.layout + second.layout)

    def choose(
        self,
        name: str,
        first: Value,
        second: Value,
        of_first: set[int],
        order: tuple[int, ...],
    ) -> Value:
        """Give channels in this order, those in `of_first` of the first value, the others of the second."""
        place = {channel: len(first.layout) + number for number, channel in enumerate(second.layout)}
        place |= {channel: number for number, channel in enumerate(first.layout) if channel in of_first}
        places = tuple(place[channel] for channel in order)
        return Value(self._cut(self._concat(name, first, second), places), first.shape, order)

    def mix(self, name: str, parts: Sequence[tuple[Value, Tensor]], channels: tuple[int, ...]) -> Value:
        """Add values up.

        Args:
            name: In the assembly.
            parts: Values, each with its weight in each channel, [C].
            channels: Of the sum, in order; what a part holds beside them is left out.
        """
        place = {channel: number for number, channel in enumerate(channels)}
        held = [channel for value, _ in parts for channel in value.layout]
        weights = torch.cat([_take(weight_C, 0, value.layout) for value, weight_C in parts])
        read = torch.tensor([channel in place for channel in held], device=weights.device)
        index = torch.tensor([place.get(channel, 0) for channel in held], device=weights.device)
        settings = {"channels": len(channels), "parts": len(held)}
        mix = Node(name, "mix", tuple(value.name for value, _ in parts), settings)
        mixed = self._assembly.add(mix, {"weight": weights * read, "index": index})
        return Value(mixed, parts[0][0].shape, channels)

    def _concat(self, name: str, first: Value, second: Value) -> str:
        return self._assembly.add(Node(name, "concat", (first.name, second.name), {}))

    def _cut(self, source: str, places: tuple[int, ...]) -> str:
        key = (source, places)
        if key not in self._cuts:
            name = f"{source}_part{len(self._cuts)}"
            start, length = places[0], len(places)
            if places == tuple(range(start, start + length)):
                cut = Node(name, "slice", (source,), {"start": start, "length": length})
                self._cuts[key] = self._assembly.add(cut)
            else:
                index = torch.tensor(places, device=self._device)
                self._cuts[key] = self._assembly.add(
                    Node(name, "select", (source,), {"count": length}), {"index": index}
                )
        return self._cuts[key]


def prune_gated(
    assembly: PrunedAssembly, gated: GatedGraph, source: Value, names: Sequence[str]
) -> list[Value]:
    """Add what the tasks read of gated branches; give the last node's value for each task, all channels.

    Channel c of a task's own branch is computed only where its gate is open, and of the shared branch only
    where some task's is closed; what lies before is computed only as far as these read it. So a task whose
    later gates are all closed rides on the shared branch, and a shared branch that nobody reads is left out.

    Args:
        assembly: Gets the nodes.
        gated: The branches.
        source: What they read, whole.
        names: Of the branches, in front of those of their nodes.
    """
    return _Pruning(assembly, gated, source, names).run()


class _Pruning:
    """Two passes: backwards, which channels are read; forwards, the layers that compute them.

    In the second each value is asked for with the order that its reader would like best. A reader must take
    another one where several read the same.
    """

    def __init__(
        self, assembly: PrunedAssembly, gated: GatedGraph, source: Value, names: Sequence[str]
    ) -> None:
        self._assembly = assembly
        self._gated = gated
        self._source = source
        self._names = names
        self._nodes = {node.name: node for node in gated.nodes}
        self._shapes = infer_shapes(gated.nodes, gated.shape)
        self._gates = {name: gates_TC.cpu() for name, gates_TC in gated.gates.items()}
        # Which channels of each node's own result, and of its value behind the gates, are read: [R, C].
        self._raw_RC, self._value_RC = self._read()
        self._raws: dict[tuple[str, int], Value] = {}
        self._values: dict[tuple[str, int], Value] = {}

    def run(self) -> list[Value]:
        branches = range(len(self._gated.layers))
        for end in self._gated.ends:  # unit by unit, which bounds the recursion
            for branch in branches:
                if self._value_RC[end][branch].any():
                    self._value(end, branch)
        return [self._value(self._gated.ends[-1], branch) for branch in branches[1:]]

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        branches = len(self._gated.layers)
        raw_RC: dict[str, Tensor] = {}
        value_RC = {
            name: torch.zeros(branches, _channels(shape), dtype=torch.bool)
            for name, shape in self._shapes.items()
        }
        value_RC[self._gated.nodes[-1].name][1:] = True
        for node in reversed(self._gated.nodes):
            read_RC = value_RC[node.name]
            if node.name in self._gates:
                # The mixed shared value reads what every task would.
                open_TC, read_TC = self._gates[node.name], read_RC[1:] | read_RC[SHARED]
                closed_1C = (read_TC & ~open_TC).any(dim=0, keepdim=True)
                read_RC = torch.cat([closed_1C, read_TC & open_TC])
            raw_RC[node.name] = read_RC
            for name in node.inputs:
                if name != INPUT:
                    value_RC[name] |= _inputs_read(node, read_RC, value_RC[name].shape[1])
        return raw_RC, value_RC

    def _value(self, name: str, branch: int, wanted: tuple[int, ...] = ()) -> Value:
        """A node's value behind the gates; it may hold more channels than asked for."""
        if name == INPUT:
            return self._source
        if name not in self._gates:
            return self._raw(name, branch, wanted)
        if (name, branch) not in self._values:
            build = self._mixed if branch == SHARED else self._gated_value
            self._values[name, branch] = build(name, branch, wanted)
        return self._values[name, branch]

    def _gated_value(self, name: str, branch: int, wanted: tuple[int, ...]) -> Value:
        open_C, read_C = self._gates[name][branch - 1], self._value_RC[name][branch]
        if not (read_C & ~open_C).any():
            return self._raw(name, branch, wanted)
        if not (read_C & open_C).any():
            return self._raw(name, SHARED, wanted)
        own, shared = self._raw(name, branch), self._raw(name, SHARED)
        joined = f"{self._name(name, branch)}_gated"
        if set(wanted) == _set(read_C):
            return self._assembly.choose(joined, own, shared, _set(open_C), wanted)
        own, shared = self._only(own, read_C & open_C), self._only(shared, read_C & ~open_C)
        return self._assembly.join(joined, own, shared)

    def _mixed(self, name: str, branch: int, wanted: tuple[int, ...]) -> Value:
        open_TC, read_C = self._gates[name], self._value_RC[name][branch]
        if not (open_TC & read_C).any():
            return self._raw(name, branch, wanted)
        mixing_TC = self._gated.mixing[name]
        open_TC = open_TC.to(mixing_TC.device)
        weights_RC = torch.cat([(mixing_TC * ~open_TC).sum(dim=0, keepdim=True), mixing_TC * open_TC])
        parts = [
            (self._raw(name, source), weights_RC[source])
            for source, used_C in enumerate(self._raw_RC[name])
            if (used_C & read_C).any()
        ]
        channels = wanted if set(wanted) == _set(read_C) else _natural(read_C)
        return self._assembly.mix(f"{self._name(name, branch)}_mixed", parts, channels)

    def _raw(self, name: str, branch: int, wanted: tuple[int, ...] = ()) -> Value:
        """A node's own result, before the gates."""
        if (name, branch) not in self._raws:
            node, read_C = self._nodes[name], self._raw_RC[name][branch]
            read = _set(read_C)
            if set(wanted) != read:
                wanted = self._by_readers(name) if name in self._gates and branch == SHARED else ()
            if KINDS[node.kind].reach in {Reach.SAME, Reach.HEAD}:
                inputs = self._aligned(node, branch, read, wanted)
            else:
                inputs = [self._value(source, branch) for source in node.inputs]
            self._raws[name, branch] = self._assembly.layer(
                self._name(name, branch),
                node,
                self._gated.layers[branch][name],
                inputs,
                self._shapes[name],
                wanted or _natural(read_C),
            )
        return self._raws[name, branch]

    def _aligned(self, node: Node, branch: int, read: set[int], wanted: tuple[int, ...]) -> list[Value]:
        """The inputs, all with just the channels `read`, in one order.

        The last one sets it: of an `add` that is the skip, which others read too, whereas the rows of the
        convolution on the other side can still follow.
        """
        *others, last = node.inputs
        value = self._value(last, branch, wanted)
        order = value.layout
        if set(order) != read:
            order = wanted or tuple(channel for channel in order if channel in read)
        if KINDS[node.kind].reach is Reach.HEAD:
            order = _by_head(order, _channels(self._shapes[node.name]) // int(node.settings["heads"]))
        values = [*(self._value(other, branch, order) for other in others), value]
        return [self._assembly.pick(value, order) for value in values]

    def _only(self, value: Value, read_C: Tensor) -> Value:
        read = _set(read_C)
        kept = tuple(channel for channel in value.layout if channel in read)
        return self._assembly.pick(value, kept)

    def _by_readers(self, name: str) -> tuple[int, ...]:
        """The shared channels that are read, sorted by the tasks that read them, as a Gray code counts.

        Then what one task reads is in few runs: one of two tasks reads just one.
        """
        readers_TC = self._value_RC[name][1:] & ~self._gates[name]
        ranks = [
            _gray_rank(sum(1 << t for t, reads in enumerate(readers) if reads))
            for readers in readers_TC.T.tolist()
        ]
        return tuple(
            sorted(_natural(self._raw_RC[name][SHARED]), key=lambda channel: (ranks[channel], channel))
        )

    def _name(self, name: str, branch: int) -> str:
        return f"{self._names[branch]}.{name}"


def _channels(shape: tuple[int, ...]) -> int:
    """Channels of a sample of this shape: tokens are the only values of two axes inside a network."""
    return shape[1] if len(shape) == 2 else shape[0]


def _rows(node: Node, value: Value, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The layout of what a layer without a choice makes of `value`."""
    whole = value.layout == tuple(range(_channels(value.shape)))
    if node.kind == "image" or (node.kind == "flatten" and whole):
        return tuple(range(_channels(shape)))
    if node.kind == "flatten":
        block = channels_per_block(value.shape)
        return tuple(channel * block + place for channel in value.layout for place in range(block))
    assert KINDS[node.kind].reach is not Reach.SPECIAL, node.kind
    return value.layout


def _inputs_read(node: Node, read_RC: Tensor, channels: int) -> Tensor:
    """Which of an input's channels are read where `read_RC` of a layer's own are."""
    if KINDS[node.kind].reach is Reach.SAME:
        return read_RC
    if KINDS[node.kind].reach is Reach.ALL:
        return read_RC.any(dim=1, keepdim=True)
    blocks = int(node.settings["heads"]) if KINDS[node.kind].reach is Reach.HEAD else channels
    blocks_RN = read_RC.view(len(read_RC), blocks, -1).any(dim=2)
    return blocks_RN.repeat_interleave(channels // blocks, dim=1)


def _by_head(order: tuple[int, ...], block: int) -> tuple[int, ...]:
    """The same channels, those of a head together and in their natural order."""
    heads = dict.fromkeys(channel // block for channel in order)
    return tuple(head * block + place for head in heads for place in range(block))


def _gray_rank(code: int) -> int:
    rank = 0
    while code:
        rank ^= code
        code >>= 1
    return rank


def _natural(read_C: Tensor) -> tuple[int, ...]:
    return tuple(read_C.nonzero()[:, 0].tolist())


def _set(read_C: Tensor) -> set[int]:
    return set(_natural(read_C))


def _take(tensor: Tensor, axis: int, channels: tuple[int, ...]) -> Tensor:
    return tensor.index_select(axis, torch.tensor(channels, device=tensor.device))
