import pytest
import torch

from coterie.models.backbones import MLP
from coterie.models.static import GroupedNetwork
from coterie.models.tasks import Grouping, Task, TaskKind, TaskSet

TASKS = TaskSet(Task(name=name, kind=TaskKind.BINARY) for name in "ab")
BACKBONE = MLP(input_shape=(3,), width=4, depth=2)


def test_a_network_is_built_around_a_state_without_copying_or_drawing() -> None:
    network = GroupedNetwork(backbone=BACKBONE, tasks=TASKS, grouping=Grouping.apart(2))
    state = network.state_dict()
    before = torch.get_rng_state()
    again = GroupedNetwork.from_state(
        state, backbone=BACKBONE, tasks=TASKS, grouping=Grouping.apart(2), split=0
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert {name: tensor.data_ptr() for name, tensor in again.state_dict().items()} == {
        name: tensor.data_ptr() for name, tensor in state.items()
    }
    assert not again.training
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_a_grouping_of_another_number_of_tasks_is_refused() -> None:
    with pytest.raises(ValueError, match="grouping: must be of 2 tasks, found one of 3"):
        GroupedNetwork(backbone=BACKBONE, tasks=TASKS, grouping=Grouping.apart(3))
