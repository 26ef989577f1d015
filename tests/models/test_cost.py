import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from coterie.models.backbones import MLP
from coterie.models.cost import Cost, count_cost, count_macs, measure_latency_ms
from coterie.models.families import build_network
from coterie.models.static import GroupedNetwork
from coterie.models.tasks import Grouping, Task, TaskKind, TaskSet

TASKS = TaskSet(Task(name=name, kind=TaskKind.BINARY) for name in "abcd")


def test_a_shared_network_by_hand() -> None:
    backbone = MLP(input_shape=(2, 5), width=4, depth=2)
    network = build_network("shared", backbone=backbone, tasks=TASKS, parameters={}).prune()
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
    network = GroupedNetwork(backbone=backbone, tasks=TASKS, grouping=grouping, split=split)
    units = [inputs * width] + [width * width] * (depth - 1)
    prefix, branch = sum(units[:split]), sum(units[split:])
    used_units = split + len(grouping) * (depth - split)
    macs = prefix + len(grouping) * branch + 4 * width
    assert count_cost(network, (inputs,)) == Cost(macs=macs, params=macs + used_units * width + 4)

    by_part = count_macs(network, (inputs,))
    assert by_part[""] == macs
    assert by_part["prefix"] == prefix
    assert [by_part[f"branches.{k}"] for k in range(len(grouping))] == [branch] * len(grouping)
    assert [by_part[f"heads.{t}"] for t in range(4)] == [width] * 4


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
    assert measure_latency_ms(network, (3, 5, 5), torch.device("cpu")) > 0

    assert [module.training for module in network.modules()] == modes
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[name]), name


class Recorder(nn.Module):
    """Notes how it was run."""

    runs: list[tuple[bool, bool, int, torch.Size]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs.append((self.training, torch.is_grad_enabled(), torch.get_num_threads(), x.shape))
        return x


def test_latency_is_of_one_sample_in_eval_mode_on_one_thread() -> None:
    Recorder.runs = []
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        measure_latency_ms(Recorder().train(), (3,), torch.device("cpu"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert set(Recorder.runs) == {(False, False, 1, torch.Size([1, 3]))}


def test_the_thread_count_comes_back_after_a_failure() -> None:
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError):
        measure_latency_ms(nn.Linear(3, 3), (4,), torch.device("cpu"))
    assert torch.get_num_threads() == threads
