"""What a static network costs to run."""

import copy
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

WARMUP_RUNS = 10  # allocator and kernel caches are filled by then
TIMED_RUNS = 50  # an odd run that the scheduler interrupts does not move their median


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """The size of a network.

    Attributes:
        macs: Multiply-accumulates of one sample through all tasks.
        params: Learned numbers.
    """

    macs: int
    params: int


def count_cost(network: nn.Module, input_shape: tuple[int, ...]) -> Cost:
    """Count the macs of one sample, and the parameters.

    Macs are half of the flops that `torch.utils.flop_counter` sees in eval mode: matrix products,
    convolutions and attention count, biases, pooling and element-wise work don't. `network` itself is left
    as it is.

    Args:
        network: Any module that takes [B, *input_shape].
        input_shape: One sample's shape, without the batch.
    """
    params = sum(parameter.numel() for parameter in network.parameters())
    return Cost(macs=count_macs(network, input_shape)[""], params=params)


def count_macs(network: nn.Module, input_shape: tuple[int, ...]) -> dict[str, int]:
    """Count the macs of one sample in each part of `network`, as `count_cost` does.

    Returns:
        Macs by the part's qualified name, as in `nn.Module.named_modules`: "" is the whole network.
    """
    frozen = copy.deepcopy(network).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        frozen(torch.zeros(1, *input_shape, device=_device(frozen)))
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    root = type(frozen).__name__
    return {
        name: flops.get(f"{root}.{name}" if name else "Global", 0) // 2 for name, _ in frozen.named_modules()
    }


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
