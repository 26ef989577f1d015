"""ETR-NLP: fixed primitives in place of learned filters, and channels that belong to tasks by design.

Ding et al., "Mitigating Task Interference in Multi-Task Learning via Explicit Task Routing with Non-Learnable
Primitives", CVPR 2023, arXiv 2308.02066.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.models.backbones import Backbone
from coterie.models.checks import check_number, check_whole_number
from coterie.models.cost import Cost, count_cost
from coterie.models.families.base import Losses, MultiTaskNetwork
from coterie.models.graph import INPUT, Node
from coterie.models.heads import feature_of, plan_head
from coterie.models.layers import (
    GREATEST_SETTING,
    BatchNorm,
    FixedNoise,
    RandomConv,
    RandomProjection,
    Setting,
)
from coterie.models.losses import task_losses
from coterie.models.static import Graph, StaticNetwork
from coterie.models.tasks import Grouping, TaskSet

# Shapes: B batch, T tasks.

OwnWidth = Literal["split", "full"]
Primitive = Literal["random_conv", "max_pool", "avg_pool", "identity", "noise"]

VECTOR_PRIMITIVES = frozenset({"random_conv", "identity", "noise"})  # those that need no space
MAX_DILATION = 16  # far beyond use: on most maps all taps but the middle one already read padding
MAX_SEED = 2**63 - 1  # of torch's generators
LEAST_NORMED = 2  # a layer norm over a single channel gives a constant

_Layer = tuple[str, dict[str, int]]  # kind and settings


class ETRNLP(MultiTaskNetwork):
    """One network whose k x k filters are fixed, and whose every learned weight is all tasks' or one task's.

    Non-learnable primitives: a learned k x k convolution, but for those of the first unit (the stem), gives
    way to a bank of fixed ones side by side and a learned 1x1 convolution that recombines them, whose norm is
    the backbone's. The paper's exact list is not known to us; ours:

    - `random_conv`: a depthwise convolution of random -1, 0 and +1, and ReLU;
    - `max_pool` and `avg_pool`, k x k; never dilated: a padding of k // 2 gives a map of the right size;
    - `identity`, every stride-th place of it where the convolution has a stride;
    - `noise`: the identity plus a number drawn once for each channel, and ReLU.

    The linear layers of an `mlp` and of a vision transformer's feed-forward part get the same bank without
    pooling. There `random_conv` is a random projection onto as many numbers as the layer reads or gives,
    whichever is fewer; it keeps the scale of what it reads, so an `mlp` needs no norm. Query, key, value and
    projection of attention stay learned, as 1x1 convolutions do.

    Explicit task routing: the C channels that a learned layer gives are a shared part and a part for each
    task. The shared part is computed from shared channels alone, task t's from shared channels and its own.
    All other layers go part to part: a layer norm sees one part's channels, and each part has attention heads
    of its own, as many as bring their width closest to the backbone's. Task t's head reads the shared
    channels and its own. So the gradient of one task's loss by another's weights is zero, and one pass
    answers all tasks, with the primitives computed once. With one task, or `gamma` = 1, all channels are
    shared.

    What is trained is a static network already, so `prune` copies it.

    Args:
        backbone: Whose layers are replaced and routed.
        tasks: The job's tasks.
        gamma: Share of the channels that all tasks share, above 0 and at most 1: round(gamma * C).
        own_width: `split` deals the rest out to the tasks as evenly as possible, so that the width stays C;
            `full` gives each task round((1 - gamma) * C).
        primitives: Which ones are in the bank, in this order.
        density: Share of entries other than 0 in each row of the random primitives, above 0 and at most 1.
            There is at least one, and the row is divided by the square root of their number.
        dilation: Of the random convolutions, times the replaced convolution's own.
        primitive_seed: What the random primitives are drawn from, apart from torch's global generator.

    Attributes:
        network: What is trained. The layers of the shared part are named `*.shared*`, those of task t
            `*.tasks.t*` and `heads.t.*`.

    Raises:
        ValueError: If a parameter is out of range, the width leaves a part without channels, no primitive
            goes with the backbone, or the backbone can't feed a task's head; nothing is allocated then.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        tasks: TaskSet,
        gamma: float = 0.5,
        own_width: OwnWidth = "split",
        primitives: Sequence[Primitive] = ("random_conv", "max_pool", "avg_pool", "identity"),
        density: float = 0.5,
        dilation: int = 1,
        primitive_seed: int = 0,
    ) -> None:
        super().__init__(backbone, tasks)
        check_number("gamma", gamma, 0, 1, above=True)
        check_number("density", density, 0, 1, above=True)
        if own_width not in get_args(OwnWidth):
            raise ValueError(f"own_width: must be one of {get_args(OwnWidth)}, found {own_width!r}")
        known = get_args(Primitive)
        if (
            not isinstance(primitives, list | tuple)
            or not primitives
            or any(name not in known or primitives.count(name) > 1 for name in primitives)
        ):
            raise ValueError(
                f"primitives: must be a list of one or more of {known}, each at most once, "
                f"found {primitives!r}"
            )
        check_whole_number("dilation", dilation, 1, MAX_DILATION)
        check_whole_number("primitive_seed", primitive_seed, 0, MAX_SEED)
        router = _Router(backbone, tasks, gamma, own_width, primitives, dilation)
        self.network = StaticNetwork(router.route())
        self._fused = _Fused(self.network, router.ends) if _Fused.fits(self.network, router.ends) else None
        self._initialise(router.recombinations)
        self._draw_primitives(density, primitive_seed)

    @property
    def grouping(self) -> Grouping | None:
        """None: tasks share channels, not groups."""
        return None

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Give each task's output: [B, *input_shape] -> {task name: ...}."""
        outputs: dict[str, Tensor] = self._fused(x) if self._fused else self.network(x)
        return outputs

    def losses(self, x: Tensor, targets: Mapping[str, Tensor], generator: torch.Generator) -> Losses:
        """Give each task's loss; draws nothing."""
        losses_T = task_losses(self(x), targets, self.tasks)
        return Losses(losses_T, losses_T.new_zeros(()))

    def prune(self) -> StaticNetwork:
        """Give a copy of the network as it is: it is static already."""
        state = {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}
        return StaticNetwork.from_state(self.network.graph, state)

    def expected_cost(self) -> Cost:
        """Give that of the network as it is."""
        return self._cost

    @cached_property
    def _cost(self) -> Cost:
        return count_cost(self.network, self.backbone.input_shape)

    def trunks(self) -> Sequence[Sequence[nn.Module]]:
        """None: routed units have other weights than the backbone's."""
        return []

    def _initialise(self, recombinations: Sequence[str]) -> None:
        """Start as the backbone does, and the 1x1 convolutions that it does not have as He et al. propose.

        By fan-in (arXiv 1502.01852): a part reads many channels and gives few.
        """
        units = [part for name, part in self.network.named_children() if name != "heads"]
        self.backbone.initialise(nn.ModuleList(units))
        for name in recombinations:
            layer = self.network.layer(name)
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    @torch.no_grad()
    def _draw_primitives(self, density: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for node in self.network.nodes:
            layer = self.network.layer(node.name)
            if isinstance(layer, RandomConv | RandomProjection):
                rows, columns = layer.weight.flatten(1).shape
                pattern = draw_pattern(rows, columns, density, generator)
                layer.weight.copy_(pattern.view_as(layer.weight))
            elif isinstance(layer, FixedNoise):
                layer.noise.normal_(generator=generator)


def draw_pattern(rows: int, columns: int, density: float, generator: torch.Generator) -> Tensor:
    """Draw a sparse pattern [rows, columns] of -1, 0 and +1 whose rows have length 1.

    Each row has the same number of entries other than 0, `density` times its length, and at least one.
    """
    entries = max(1, round(density * columns))
    places = torch.rand(rows, columns, generator=generator).argsort(dim=1)
    signs = 2.0 * torch.randint(2, (rows, columns), generator=generator) - 1
    return torch.where(places < entries, signs, 0.0) / math.sqrt(entries)


def check_routing(backbone: Backbone, tasks: TaskSet, *, gamma: float, own_width: OwnWidth) -> None:
    """Check that each part of a routed network gets channels, without building it.

    Raises:
        ValueError: If the width is too small; the message says what would fit.
    """
    _Router(backbone, tasks, gamma, own_width, get_args(Primitive), dilation=1).check_width()


class _Router:
    """Turns a backbone and its heads into one graph of routed layers.

    Every value of the backbone becomes a tuple of nodes, its parts: the shared one, and one a task unless all
    is shared. The input is shared.
    """

    def __init__(
        self,
        backbone: Backbone,
        tasks: TaskSet,
        gamma: float,
        own_width: OwnWidth,
        primitives: Sequence[Primitive],
        dilation: int,
    ) -> None:
        self.backbone = backbone
        self.tasks = tasks
        self.gamma = 1 if len(tasks) == 1 else gamma
        self.own_width = own_width
        self.primitives = primitives
        self.dilation = dilation
        self.nodes: list[Node] = []
        self.recombinations: list[str] = []
        self.ends: dict[str, int] = {}  # the parts of the last unit's output, and their channels

        self._units = [unit.nodes for unit in backbone.plan()]
        plan = {node.name: node for nodes in self._units for node in nodes}
        self._learned = [node for node in plan.values() if node.kind in {"conv", "linear"}]
        # An attention does not say how wide it is; what it attends to does.
        self._attended = {
            node.name: int(plan[node.inputs[0]].settings["outputs"])
            for node in plan.values()
            if node.kind == "attention"
        }
        kept = {node.name for node in self._units[0] if node.kind == "conv"}
        for node in plan.values():
            if node.kind == "attention":
                kept |= set(node.inputs)
            elif self._attended.keys() & set(node.inputs):
                kept.add(node.name)
        self._replaced = {
            node.name
            for node in self._learned
            if node.name not in kept and (node.kind == "linear" or int(node.settings["kernel"]) > 1)
        }
        self._least = LEAST_NORMED if any(node.kind == "layer_norm" for node in plan.values()) else 1

    def route(self) -> Graph:
        """Give the graph.

        Raises:
            ValueError: As `ETRNLP` does.
        """
        heads = [plan_head(task, self.backbone) for task in self.tasks]
        self.check_width()
        self._check_primitives()
        parts: tuple[str, ...] = (INPUT,)
        for nodes in self._units:
            parts = self._route_chain("", nodes, parts)
        necks = {
            feature: self._route_chain(f"necks.{feature}.", self.backbone.neck(feature), parts)
            for feature in dict.fromkeys(map(feature_of, self.tasks))
        }
        shape = self.backbone.output_shapes[-1]
        channels = shape[1] if len(shape) == 2 else shape[0]  # tokens have theirs last
        self.ends = dict(zip(parts, self._deal(channels), strict=True))
        shared_width, *own_widths = self.ends.values()
        outputs = {}
        for t, (task, (first, *others)) in enumerate(zip(self.tasks, heads, strict=True)):
            feature = feature_of(task)
            shared, *own = necks[feature]
            read = self._concat(f"heads.{t}.read", [shared, *own[t : t + 1]])
            # Flattening makes several numbers of a channel.
            each = self.backbone.feature_shape(feature)[0] // channels
            inputs = each * (shared_width + sum(own_widths[t : t + 1]))
            values = {INPUT: read}
            for node in (replace(first, settings={**first.settings, "inputs": inputs}), *others):
                sources = [values[source] for source in node.inputs]
                values[node.name] = self._add(f"heads.{t}.{node.name}", node.kind, *sources, **node.settings)
            outputs[task.name] = self.nodes[-1].name
        graph = Graph(input_shape=self.backbone.input_shape, nodes=tuple(self.nodes), outputs=outputs)
        users = graph.users()  # a task's own part has no head behind a neck that its head does not read
        return replace(graph, nodes=tuple(node for node in self.nodes if users[node.name]))

    def _deal(self, channels: int) -> tuple[int, ...]:
        """Split channels into those of each part."""
        if self.gamma == 1:
            return (channels,)
        shared, tasks = round(self.gamma * channels), len(self.tasks)
        if self.own_width == "full":
            return (shared, *[round((1 - self.gamma) * channels)] * tasks)
        each, left = divmod(channels - shared, tasks)
        return (shared, *(each + (t < left) for t in range(tasks)))

    def check_width(self) -> None:
        """Raise ValueError where a part would be without channels."""

        def fits(channels: int) -> bool:  # once it is true it stays so as channels grow
            return min(self._deal(channels)) >= self._least

        narrowest = min(self._learned, key=lambda node: node.settings["outputs"])
        found = int(narrowest.settings["outputs"])
        if not fits(found):
            if not fits(GREATEST_SETTING):
                raise ValueError(
                    f"gamma: must leave the shared part and each of {len(self.tasks)} tasks' a channel in a "
                    f"layer of {GREATEST_SETTING}, found {self.gamma!r}"
                )
            needed = 1 + bisect_left(range(1, GREATEST_SETTING), True, key=fits)
            raise ValueError(
                f"width: must give each layer at least {needed} channels with {len(self.tasks)} tasks, gamma "
                f"{self.gamma} and own_width {self.own_width!r}, found {found} in {narrowest.name!r}"
            )

    def _check_primitives(self) -> None:
        flat = any(node.kind == "linear" and node.name in self._replaced for node in self._learned)
        if flat and not VECTOR_PRIMITIVES & set(self.primitives):
            raise ValueError(
                f"primitives: of {self.backbone.name!r} must include one of {sorted(VECTOR_PRIMITIVES)}, "
                f"found {self.primitives!r}"
            )

    def _route_chain(self, prefix: str, nodes: Sequence[Node], parts: tuple[str, ...]) -> tuple[str, ...]:
        """Route layers that read `parts`; give the parts of their output."""
        values = {INPUT: parts}
        for node in nodes:
            inputs = [values[name] for name in node.inputs]
            if node.kind in {"conv", "linear"}:
                parts = self._route_learned(node, inputs[0])
            else:
                parts = tuple(
                    self._add(
                        f"{prefix}{node.name}.{label(i)}", node.kind, *sources, **self._settings(node, i)
                    )
                    for i, sources in enumerate(zip(*inputs, strict=True))
                )
            values[node.name] = parts
        return parts

    def _settings(self, node: Node, part: int) -> dict[str, Setting]:
        """Give what a layer that goes part to part is in one of them."""
        settings = dict(node.settings)
        if "channels" in settings:
            settings["channels"] = self._deal(int(settings["channels"]))[part]
        if node.kind == "attention":
            whole = self._attended[node.name]
            settings["heads"] = fitting_heads(self._deal(whole)[part], whole / int(settings["heads"]))
        return settings

    def _route_learned(self, node: Node, parts: tuple[str, ...]) -> tuple[str, ...]:
        """Route a layer that is learned, or the bank and the recombination in its place."""
        settings = dict(node.settings)
        inputs = int(settings["inputs"])
        widths = self._deal(inputs) if len(parts) > 1 else (inputs,)
        replaced = node.name in self._replaced
        banks = [
            self._bank(node, label(i), source, width) if replaced else ([source], width)
            for i, (source, width) in enumerate(zip(parts, widths, strict=True))
        ]
        if replaced and node.kind == "conv":
            settings = {"kernel": 1, "bias": settings.get("bias", False)}
        routed = []
        (shared, shared_width), *own = banks
        source = self._concat(f"{node.name}.read.shared", shared)
        for i, outputs in enumerate(self._deal(int(node.settings["outputs"]))):
            read, width = source, shared_width
            if i and own:
                bank, own_width = own[i - 1]
                read = self._concat(f"{node.name}.read.{label(i)}", [source, *bank])
                width += own_width
            settings |= {"inputs": width, "outputs": outputs}
            routed.append(self._add(f"{node.name}.{label(i)}", node.kind, read, **settings))
        if replaced:
            self.recombinations += routed
        return tuple(routed)

    def _bank(self, node: Node, part: str, source: str, width: int) -> tuple[list[str], int]:
        """Add the primitives that stand before a recombination on one part; give them and their channels."""
        settings = node.settings
        relu: _Layer = ("relu", {})
        noise: list[_Layer] = [("fixed_noise", {"channels": width}), relu]
        if node.kind == "linear":
            projected = min(width, int(settings["outputs"]))
            forms: dict[str, list[_Layer]] = {
                "random_conv": [("random_projection", {"inputs": width, "outputs": projected}), relu],
                "identity": [],
                "noise": noise,
            }
            channels = {"random_conv": projected}
        else:
            kernel, padding = int(settings["kernel"]), int(settings.get("padding", 0))
            stride, dilation = int(settings.get("stride", 1)), int(settings.get("dilation", 1))
            assert kernel % 2 == 1  # so that all primitives give maps of one size
            assert padding == dilation * (kernel // 2)
            random = {
                "channels": width,
                "kernel": kernel,
                "stride": stride,
                "padding": padding * self.dilation,
                "dilation": dilation * self.dilation,
            }
            pool = {"kernel": kernel, "stride": stride, "padding": kernel // 2}
            identity: list[_Layer] = [("subsample", {"stride": stride})] if stride > 1 else []
            forms = {
                "random_conv": [("random_conv", random), relu],
                "max_pool": [("max_pool", pool)],
                "avg_pool": [("avg_pool", pool)],
                "identity": identity,
                "noise": [*identity, *noise],
            }
            channels = {}
        bank, total = [], 0
        for primitive in self.primitives:
            if primitive not in forms:
                continue
            value = source
            for kind, its in forms[primitive]:
                value = self._add(f"{node.name}.bank.{part}.{primitive}.{kind}", kind, value, **its)
            bank.append(value)
            total += channels.get(primitive, width)
        return bank, total

    def _concat(self, name: str, sources: Sequence[str]) -> str:
        """Put values one behind another; a single one is that already."""
        return self._add(name, "concat", *sources) if len(sources) > 1 else sources[0]

    def _add(self, name: str, kind: str, *inputs: str, **settings: Setting) -> str:
        self.nodes.append(Node(name, kind, inputs, settings))
        return name


class _Fused:
    """Computes what a routed network of maps does, with all parts of a value in one tensor.

    A few wide layers are faster than many narrow ones. A layer of the shared part runs once for all parts,
    with the weights of its twins side by side, and zeros for the channels that a part does not read.

    Args:
        network: Whose layers it runs; it has none of its own.
        ends: The parts of the last unit's output, and their channels.
    """

    def __init__(self, network: StaticNetwork, ends: Mapping[str, int]) -> None:
        self._outputs = network.graph.outputs
        self._ends = ends
        trunk, behind = _split_behind(network, ends)
        self._behind = [(node, network.layer(node.name)) for node in behind]
        self._steps: list[tuple[Node, Callable[..., Tensor]]] = []
        names = {node.name for node in trunk}
        primitives = {node.name: len(node.inputs) for node in trunk if node.kind == "concat"}
        for node in trunk:
            before, shared, after = node.name.partition(label(0))
            if shared:
                twins = [f"{before}{label(part)}{after}" for part in range(len(ends))]
                layers = [network.layer(name) for name in twins if name in names]
                self._steps.append((node, _fuse(layers, primitives.get(node.inputs[0], 1))))

    @staticmethod
    def fits(network: StaticNetwork, ends: Mapping[str, int]) -> bool:
        """Whether there are parts to fuse, and nothing but maps before the heads."""
        trunk, _ = _split_behind(network, ends)
        return len(ends) > 1 and not any(node.kind in {"linear", "tokens"} for node in trunk)

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """Give each task's output."""
        values = {INPUT: x}
        for node, run in self._steps:
            values[node.name] = run(*[values[name] for name in node.inputs])
        whole = values[next(iter(self._ends))]
        values = dict(zip(self._ends, torch.split(whole, list(self._ends.values()), dim=1), strict=True))
        for node, layer in self._behind:
            values[node.name] = layer(*[values[name] for name in node.inputs])
        return {task: values[name] for task, name in self._outputs.items()}


def _split_behind(
    network: StaticNetwork, ends: Mapping[str, int]
) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """Split the nodes behind the last of `ends`."""
    behind = 1 + max(number for number, node in enumerate(network.nodes) if node.name in ends)
    return network.nodes[:behind], network.nodes[behind:]


def _fuse(twins: Sequence[Any], primitives: int) -> Callable[..., Tensor]:
    """Give the layer that does on all parts at once what each twin does on its own.

    Args:
        twins: The layer of each part.
        primitives: How many stand side by side in what it reads.
    """
    first: Callable[..., Tensor] = twins[0]
    if isinstance(first, nn.Conv2d):
        return partial(_convolve, twins, primitives)
    if isinstance(first, RandomConv):
        return partial(_convolve_each_channel, twins)
    if isinstance(first, FixedNoise):
        return partial(_add_noise, twins)
    if isinstance(first, BatchNorm):
        return partial(_normalise, twins)
    return first


def _convolve(twins: Sequence[nn.Conv2d], primitives: int, x: Tensor) -> Tensor:
    first = twins[0]
    assert first.bias is None
    weight = _wide_weight([twin.weight for twin in twins], primitives)
    return F.conv2d(x, weight, None, first.stride, first.padding, first.dilation)


def _wide_weight(weights: Sequence[Tensor], primitives: int) -> Tensor:
    """Put weights one below another, with zeros for the channels that a part does not read.

    A part's weight has the columns of the shared part's primitives, then those of its own; the wide one has
    for each primitive the channels of all parts.
    """
    shared, *own = weights
    columns, kernel = shared.shape[1], shared.shape[2:]
    if own[0].shape[1] == columns:  # all read the network's input
        return torch.cat([shared, *own])

    def place(weight: Tensor, before: int, width: int) -> Tensor:
        """Lay a weight out by primitives, with zeros in front of its `width` channels and behind them."""
        by_primitive = weight.reshape(len(weight), primitives, width, *kernel)
        return F.pad(by_primitive, (0, 0, 0, 0, before, whole - before - width))

    common = columns // primitives
    widths = [(weight.shape[1] - columns) // primitives for weight in own]
    whole, before = common + sum(widths), common
    rows = [place(shared, 0, common)]
    for weight, width in zip(own, widths, strict=True):
        shares, owns = weight.tensor_split([columns], dim=1)
        rows.append(place(shares, 0, common) + place(owns, before, width))
        before += width
    return torch.cat(rows).flatten(1, 2)


def _convolve_each_channel(twins: Sequence[RandomConv], x: Tensor) -> Tensor:
    first, weight = twins[0], torch.cat([twin.weight for twin in twins])
    return F.conv2d(x, weight, None, first.stride, first.padding, first.dilation, groups=x.shape[1])


def _add_noise(twins: Sequence[FixedNoise], x: Tensor) -> Tensor:
    return x + torch.cat([twin.noise for twin in twins]).view(-1, 1, 1)


def _normalise(twins: Sequence[BatchNorm], x: Tensor) -> Tensor:
    """Normalise, and in training keep each twin's running statistics up."""
    first = twins[0]
    weight, bias, mean, variance = (
        torch.cat([getattr(twin, name) for twin in twins])
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    assert first.momentum is not None
    y = F.batch_norm(x, mean, variance, weight, bias, first.training, first.momentum, first.eps)
    if first.training:
        widths = [twin.num_features for twin in twins]
        statistics = zip(torch.split(mean, widths), torch.split(variance, widths), strict=True)
        for twin, (its_mean, its_variance) in zip(twins, statistics, strict=True):
            assert twin.running_mean is not None
            assert twin.running_var is not None
            assert twin.num_batches_tracked is not None
            twin.running_mean.copy_(its_mean)
            twin.running_var.copy_(its_variance)
            twin.num_batches_tracked.add_(1)
    return y


def label(part: int) -> str:
    """What a part's layers are named by: part 0 is the shared one, part t + 1 is task t's."""
    return f"tasks.{part - 1}" if part else "shared"


def fitting_heads(channels: int, head_channels: float) -> int:
    """Give the number of heads that divides `channels` and whose width comes closest to `head_channels`.

    Example:
        >>> fitting_heads(96, 64), fitting_heads(48, 64), fitting_heads(7, 64)
        (2, 1, 1)
    """
    divisors = [heads for heads in range(1, channels + 1) if channels % heads == 0]
    return min(divisors, key=lambda heads: abs(math.log(channels / heads / head_channels)))
