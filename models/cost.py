"""What a static network costs to run."""

import copy
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from coterie.models.backbones import Backbone
from coterie.models.graph import Node
from coterie.models.static import Graph, StaticNetwork

WARMUP_RUNS = 10  # allocator and kernel caches are filled by then
TIMED_RUNS = 50  # an odd run that the scheduler interrupts does not move their median
MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """The size of a network or of a part of one: whole numbers, unless it is an expectation.

    Attributes:
        macs: Multiply-accumulates of one sample through all tasks.
        params: Learned numbers.
    """

    macs: float = 0
    params: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        """Give that of two parts."""
        return Cost(macs=self.macs + other.macs, params=self.params + other.params)

    def __mul__(self, times: float) -> "Cost":
        """Give that of as many such parts, or of a share of one."""
        return Cost(macs=self.macs * times, params=self.params * times)

    def __truediv__(self, parts: int) -> "Cost":
        """Give that of one of so many equal parts."""
        return Cost(macs=self.macs / parts, params=self.params / parts)


def count_cost(network: nn.Module, input_shape: tuple[int, ...]) -> Cost:
    """Count the macs of one sample, and the parameters.

    Macs are half of the flops that `torch.utils.flop_counter` sees in eval mode: matrix products,
    convolutions and attention count, biases, pooling and element-wise work don't. `network` itself is left
    as it is.

    Args:
        network: Any module that takes [B, *input_shape].
        input_shape: One sample's shape, without the batch.
    """
    return Cost(macs=count_macs(network, input_shape)[""], params=_count_params(network))


def count_macs(network: nn.Module, input_shape: tuple[int, ...]) -> dict[str, int]:
    """Count the macs of one sample in each part of `network`, as `count_cost` does.

    Returns:
        Macs by the part's qualified name, as in `nn.Module.named_modules`: "" is the whole network.
    """
    frozen = copy.deepcopy(network).eval()
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_ATTENTION_ON_CPU) as counter:
        frozen(torch.zeros(1, *input_shape, device=_device(frozen)))
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    root = type(frozen).__name__
    return {
        name: flops.get(f"{root}.{name}" if name else "Global", 0) // 2 for name, _ in frozen.named_modules()
    }


def macs_by_node(network: StaticNetwork) -> dict[str, int]:
    """Count the macs of one sample in each node of `network`, by the node's name, as `count_cost` does."""
    macs = count_macs(network, network.graph.input_shape)
    return {node.name: macs[node.name] for node in network.nodes}


def cost_by_node(network: StaticNetwork) -> dict[str, Cost]:
    """Count each node of `network`, by its name, as `count_cost` does."""
    return {
        name: Cost(macs=macs, params=_count_params(network.layer(name)))
        for name, macs in macs_by_node(network).items()
    }


def sum_costs(costs: Iterable[Cost]) -> Cost:
    """Add up."""
    return sum(costs, start=Cost())


@lru_cache(maxsize=256)
def unit_costs(backbone: Backbone) -> tuple[Cost, ...]:
    """Count each unit of a backbone, in order; allocates no weights."""
    shapes = (backbone.input_shape, *backbone.output_shapes)
    return tuple(chain_cost(unit.nodes, shape) for unit, shape in zip(backbone.plan(), shapes, strict=False))


def measure_latency_ms(network: nn.Module, input_shape: tuple[int, ...], device: torch.device) -> float:
    """Time one sample through a copy of `network` on `device`: median of warmed-up runs in eval mode, in ms.

    On a CPU torch is held to one thread meanwhile, in the whole process.
    """
    frozen = copy.deepcopy(network).to(device).eval()
    x = torch.zeros(1, *input_shape, device=device)
    seconds = []
    with torch.inference_mode(), _one_thread():
        for _ in range(WARMUP_RUNS + TIMED_RUNS):
            start = time.perf_counter()
            frozen(x)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[WARMUP_RUNS:])


def measure_peak_memory_mb(
    network: nn.Module, input_shape: tuple[int, ...], device: torch.device, batch: int = 1
) -> float:
    """Measure the most memory that tensors take at once in one forward pass in eval mode, in MiB.

    Weights, buffers and input count. What kernels need within a call (workspaces, packed weights) counts on
    CUDA, and not on a CPU, where torch does not show it; what libraries keep between calls never counts.

    Args:
        network: Any module that takes [B, *input_shape]; a copy of it runs.
        input_shape: One sample's shape, without the batch.
        device: Where; on a CPU the figure is the same each time.
        batch: B.
    """
    frozen = copy.deepcopy(network).to(device).eval()
    x = torch.zeros(batch, *input_shape, device=device)
    held = [*frozen.parameters(), *frozen.buffers(), x]
    with torch.no_grad():
        if device.type != "cuda":
            watch = _StorageWatch(held)
            with watch:
                frozen(x)
            return watch.peak / MIB
        frozen(x)  # what libraries allocate once is there before the second pass
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        frozen(x)
        torch.cuda.synchronize(device)
        grown: int = torch.cuda.max_memory_allocated(device) - before
    return (_StorageWatch(held).peak + grown) / MIB


class _StorageWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the memory of tensors while operations run: each storage from its first tensor to its last.

    Args:
        held: Tensors that are there from the start.

    Attributes:
        peak: The most bytes at once so far.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: dict[int, int] = {}
        self._bytes = 0
        self.peak = 0
        for tensor in held:
            self._follow(tensor)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation, and follow what it gives."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf)
        return result

    def _follow(self, tensor: Tensor) -> None:
        # A view has its base's storage, and torch keeps a storage's Python object as long as the storage.
        storage = tensor.untyped_storage()
        if id(storage) not in self._alive:
            self._alive[id(storage)] = storage.nbytes()
            self._bytes += storage.nbytes()
            self.peak = max(self.peak, self._bytes)
            weakref.finalize(storage, self._forget, id(storage)).atexit = False

    def _forget(self, storage: int) -> None:
        self._bytes -= self._alive.pop(storage)


def _attention_flops(
    q: torch.Size, k: torch.Size, v: torch.Size, *_: object, out_shape: object = None, **__: object
) -> int:
    """Flops of the two products of attention, from the shapes of its inputs."""
    return int(sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]


# torch's counter knows the attention kernels of CUDA, and takes the CPU's for nothing.
_ATTENTION_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def _count_params(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def chain_cost(nodes: Sequence[Node], shape: tuple[int, ...]) -> Cost:
    """Count the layers of a chain on one input of this shape; allocates no weights."""
    graph = Graph(input_shape=shape, nodes=tuple(nodes), outputs={"": nodes[-1].name})
    return count_cost(StaticNetwork.empty(graph), shape)


def _device(network: nn.Module) -> torch.device:
    return next((tensor.device for tensor in network.parameters()), torch.device("cpu"))


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
