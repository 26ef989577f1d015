import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from coterie.models.backbones import MLP, ResNet20, ViTTiny
from coterie.models.cost import (
    MIB,
    Cost,
    count_cost,
    count_macs,
    macs_by_node,
    measure_latency_ms,
    measure_peak_memory_mb,
)
from coterie.models.families import Grouped, Shared
from coterie.models.graph import node
from coterie.models.static import Graph, StaticNetwork
from coterie.models.tasks import Grouping, Task, TaskKind, TaskSet

TASKS = TaskSet(Task(name=name, kind=TaskKind.BINARY) for name in "abcd")
CPU = torch.device("cpu")
FLOAT = 4  # bytes


def test_a_shared_network_by_hand() -> None:
    backbone = MLP(input_shape=(2, 5), width=4, depth=2)
    network = Shared(backbone=backbone, tasks=TASKS).prune()
    # Linear 10 -> 4, Linear 4 -> 4, four heads 4 -> 1, and a bias for each output
    assert count_cost(network, (2, 5)) == Cost(macs=40 + 16 + 4 * 4, params=44 + 20 + 4 * 5)


@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 4),
    st.lists(st.integers(0, 3), min_size=4, max_size=4),
    st.data(),
)
def test_units_count_once_in_the_prefix_and_once_a_branch(
    inputs: int, width: int, depth: int, labels: list[int], data: st.DataObject
) -> None:
    split = data.draw(st.integers(0, depth - 1))
    backbone = MLP(input_shape=(inputs,), width=width, depth=depth)
    grouping = Grouping.from_labels(labels)
    network = Grouped(backbone=backbone, tasks=TASKS, grouping=grouping.names(TASKS), split=split).prune()
    units = [inputs * width] + [width * width] * (depth - 1)
    used_units = split + len(grouping) * (depth - split)
    macs = sum(units[:split]) + len(grouping) * sum(units[split:]) + 4 * width
    assert count_cost(network, (inputs,)) == Cost(macs=macs, params=macs + used_units * width + 4)

    by_node = macs_by_node(network)
    assert list(by_node) == [node.name for node in network.nodes]
    assert sum(by_node.values()) == macs
    for name, found in by_node.items():
        layer = network.layer(name)
        assert found == (layer.weight.numel() if isinstance(layer, nn.Linear) else 0), name


def test_convolutions_and_batch_norm_count_in_eval_mode_without_a_trace_on_the_network() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(36, 2)
    )
    network.train()
    network[2].eval()
    modes = [module.training for module in network.modules()]
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    # 3x3 kernels over 3 channels into 4, at 3x3 places of a 5x5 image
    assert count_cost(network, (3, 5, 5)) == Cost(macs=27 * 4 * 9 + 36 * 2, params=112 + 8 + 74)
    assert measure_latency_ms(network, (3, 5, 5), CPU) > 0
    assert measure_peak_memory_mb(network, (3, 5, 5), CPU) > 0

    assert [module.training for module in network.modules()] == modes
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_a_transformers_block_by_hand() -> None:
    backbone = ViTTiny(input_shape=(3, 8, 12), width=0.125, patch=2)
    tokens, stream, hidden = 1 + 4 * 6, 24, 96
    units = backbone.build()
    block = {
        "norm1": 0,
        "attn.q": tokens * stream * stream,
        "attn.k": tokens * stream * stream,
        "attn.v": tokens * stream * stream,
        "attn.mix": 2 * tokens * tokens * stream,  # scores, and means of the values
        "attn.proj": tokens * stream * stream,
        "mlp.fc1": tokens * stream * hidden,
        "mlp.act": 0,
        "mlp.fc2": tokens * hidden * stream,
    }
    macs = count_macs(units[1], (tokens, stream))
    assert {name: macs[f"blocks.0.{name}"] for name in block} == block
    assert macs[""] == sum(block.values())


def test_a_random_convolution_counts_each_channel_once() -> None:
    nodes = (
        node("random", "random_conv", "input", channels=5, kernel=3, padding=1),
        node("mean", "space_mean", "random"),
        node("head", "linear", "mean", inputs=5, outputs=2),
    )
    # The random weight is not learned, so it is no parameter.
    network = StaticNetwork(Graph(input_shape=(5, 4, 6), nodes=nodes, outputs={"a": "head"}))
    assert macs_by_node(network) == {"random": 5 * 9 * 24, "mean": 0, "head": 10}
    assert count_cost(network, (5, 4, 6)) == Cost(macs=5 * 9 * 24 + 10, params=12)


def test_peak_memory_by_hand() -> None:
    network = nn.Sequential(nn.Linear(10, 300), nn.ReLU(), nn.Linear(300, 20))
    weights = 10 * 300 + 300 + 300 * 20 + 20
    for batch in (1, 7):
        # ReLU reads 300 numbers a sample and gives 300; input and weights are there all the time
        numbers = weights + batch * (10 + 300 + 300)
        assert measure_peak_memory_mb(network, (10,), CPU, batch) == FLOAT * numbers / MIB


def test_a_graph_lets_go_of_what_is_read_no_more() -> None:
    nodes = [node("wide", "linear", "input", inputs=2, outputs=500)]
    nodes += [node(f"relu{n}", "relu", f"relu{n - 1}" if n else "wide") for n in range(9)]
    nodes.append(node("head", "linear", "relu8", inputs=500, outputs=1))
    network = StaticNetwork(Graph(input_shape=(2,), nodes=tuple(nodes), outputs={"a": "head"}))
    # one value of 500 and the next: never ten
    numbers = (2 * 500 + 500) + (500 + 1) + 2 + 2 * 500
    assert measure_peak_memory_mb(network, (2,), CPU) == FLOAT * numbers / MIB


class InPlace(nn.Module):
    """Views and in-place work on one value."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y.view(2, -1).add_(1).relu_()
        return y.transpose(0, 1)[1:]


def test_views_and_work_in_place_take_nothing() -> None:
    assert measure_peak_memory_mb(InPlace(), (4, 6), CPU, batch=2) == FLOAT * 2 * (2 * 4 * 6) / MIB


def test_weights_that_two_layers_share_count_once() -> None:
    layer = nn.Linear(100, 100)
    once = measure_peak_memory_mb(nn.Sequential(layer, nn.ReLU()), (100,), CPU)
    assert measure_peak_memory_mb(nn.Sequential(layer, nn.ReLU(), layer), (100,), CPU) == once


def test_peak_memory_is_the_same_each_time_and_grows_with_the_batch() -> None:
    network = Shared(backbone=ResNet20(input_shape=(3, 16, 16), width=0.25), tasks=TASKS).prune()
    found = {measure_peak_memory_mb(network, (3, 16, 16), CPU, 4) for _ in range(3)}
    assert len(found) == 1
    assert found.pop() > measure_peak_memory_mb(network, (3, 16, 16), CPU, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_on_a_gpu_is_of_the_order_of_the_cpus() -> None:
    network = Shared(backbone=ResNet20(input_shape=(3, 64, 64)), tasks=TASKS).prune()
    gpu = torch.device("cuda")
    found = [measure_peak_memory_mb(network, (3, 64, 64), gpu, 16) for _ in range(3)]
    assert len(set(found)) == 1
    on_cpu = measure_peak_memory_mb(network, (3, 64, 64), CPU, 16)
    assert 0.9 * on_cpu <= found[0]


class Recorder(nn.Module):
    """Notes how it was run."""

    runs: list[tuple[bool, bool, int, torch.Size]]

    def forward(self, x: Tensor) -> Tensor:
        self.runs.append((self.training, torch.is_grad_enabled(), torch.get_num_threads(), x.shape))
        return x


def test_latency_is_of_one_sample_in_eval_mode_on_one_thread() -> None:
    Recorder.runs = []
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        measure_latency_ms(Recorder().train(), (3,), CPU)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert set(Recorder.runs) == {(False, False, 1, torch.Size([1, 3]))}


def test_the_thread_count_comes_back_after_a_failure() -> None:
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError):
        measure_latency_ms(nn.Linear(3, 3), (4,), CPU)
    assert torch.get_num_threads() == threads
