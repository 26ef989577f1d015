from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from coterie.models import balancing
from coterie.models.backbones import MLP
from coterie.models.balancing import BALANCINGS, DWA, Balancer, RandomWeighting, Uncertainty, build_balancer
from coterie.models.cost import Cost
from coterie.models.families import DMTG, Grouped, InterroGate, Shared, Single
from coterie.models.families.base import Losses, MultiTaskNetwork
from coterie.models.static import StaticNetwork
from coterie.models.tasks import Task, TaskKind, TaskSet

# Shapes: B batch, P parameters, T tasks.

pytestmark = pytest.mark.filterwarnings(
    "ignore:You are solving a parameterized problem"
)  # of Nash-MTL's cvxpy

BACKBONE = MLP(input_shape=(6,), width=8, depth=2)
AGGREGATIONS = [name for name in BALANCINGS if name not in {"fixed", "uncertainty", "dwa", "random"}]
# Equal to the plain sum where nothing conflicts, up to what UPGrad's solver regularises.
SUMS = ["upgrad", "pcgrad", "dualproj", "graddrop"]

MIXED = TaskSet(
    [
        Task(name="a", kind=TaskKind.BINARY),
        Task(name="b", kind=TaskKind.MULTICLASS, outputs=3, weight=2.0),
        Task(name="c", kind=TaskKind.REGRESSION),
    ]
)

every_balancing = pytest.mark.parametrize("name", BALANCINGS)
every_aggregation = pytest.mark.parametrize("name", AGGREGATIONS)


def batch() -> tuple[Tensor, dict[str, Tensor]]:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(16, 6, generator=random)
    return x, {"a": (x[:, 0] > 0).float(), "b": (x[:, 1] > 0).long() + (x[:, 2] > 0).long(), "c": x[:, 3]}


def network_of(family: type[MultiTaskNetwork] = Shared, **parameters: object) -> MultiTaskNetwork:
    torch.manual_seed(0)
    return family(backbone=BACKBONE, tasks=MIXED, **parameters)  # type: ignore[arg-type]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def gradients(network: nn.Module, backward: Callable[[], object]) -> dict[str, Tensor]:
    for parameter in network.parameters():
        parameter.grad = None
    backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def balanced(name: str, network: MultiTaskNetwork) -> dict[str, Tensor]:
    balancer = build_balancer(name, network.tasks)
    losses = network.losses(*batch(), generator())
    return gradients(network, lambda: balancer.backward(losses, network, generator()))


class Toy(MultiTaskNetwork):
    """Tasks whose losses have given gradients by a parameter that all share; the first has one of its own."""

    def __init__(self, *rows: list[float]) -> None:
        tasks = TaskSet(Task(name=str(t), kind=TaskKind.REGRESSION) for t in range(len(rows)))
        super().__init__(BACKBONE, tasks)
        self.rows_TP = torch.tensor(rows)
        self.shared = nn.Parameter(torch.zeros(self.rows_TP.shape[1]))
        self.own = nn.Parameter(torch.zeros(1))

    @property
    def grouping(self) -> None:
        return None

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def losses(self, x: Tensor, targets: Mapping[str, Tensor], generator: torch.Generator) -> Losses:
        own_T = torch.cat([self.own, torch.zeros(len(self.tasks) - 1)])
        return Losses(self.rows_TP @ self.shared + 3 * own_T + 1, 5 * self.shared[0] + 7 * self.own[0])

    def prune(self) -> StaticNetwork:
        raise NotImplementedError

    def expected_cost(self) -> Cost:
        raise NotImplementedError

    def trunks(self) -> list[list[nn.Module]]:
        return []


def step_of(name: str, *rows: list[float]) -> Tensor:
    """What a balancing makes of the toy's gradients by the shared parameter, without the penalty's."""
    network = Toy(*rows)
    losses = network.losses(torch.zeros(0), {}, generator())
    build_balancer(name, network.tasks).backward(
        Losses(losses.tasks_T, torch.zeros(())), network, generator()
    )
    assert network.shared.grad is not None
    return network.shared.grad


def test_fixed_is_the_training_loss() -> None:
    for network in (network_of(), network_of(InterroGate), network_of(DMTG, groups=2, entropy_weight=0.5)):
        plain = gradients(
            network,
            lambda n=network: torch.autograd.backward(n.training_loss(*batch(), generator())),  # type: ignore[misc]
        )
        found = balanced("fixed", network)
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_the_scalar_of_fixed_is_the_training_loss() -> None:
    network = network_of(InterroGate)
    total = build_balancer("fixed", MIXED).backward(
        network.losses(*batch(), generator()), network, generator()
    )
    assert torch.equal(total, network.training_loss(*batch(), generator()).detach())
    assert not total.requires_grad


@every_balancing
def test_every_balancing_lowers_every_loss_of_a_fixed_batch(name: str) -> None:
    network = network_of()
    balancer = build_balancer(name, MIXED)
    optimizer = torch.optim.Adam([*network.parameters(), *balancer.parameters()], lr=1e-2)
    random = generator()
    before_T = network.losses(*batch(), random).tasks_T.detach()
    for _ in range(40):
        optimizer.zero_grad(set_to_none=True)
        assert balancer.backward(network.losses(*batch(), random), network, random).isfinite()
        optimizer.step()
        balancer.end_epoch()
    after_T = network.losses(*batch(), random).tasks_T.detach()
    assert (after_T < 0.7 * before_T).all()


@every_balancing
def test_a_training_that_goes_on_from_its_state_is_the_same(name: str) -> None:
    def steps(network: MultiTaskNetwork, balancer: Balancer, random: torch.Generator, epochs: int) -> None:
        optimizer = torch.optim.SGD([*network.parameters(), *balancer.parameters()], lr=0.05)
        for _ in range(epochs):
            for _ in range(2):
                optimizer.zero_grad(set_to_none=True)
                balancer.backward(network.losses(*batch(), random), network, random)
                optimizer.step()
            balancer.end_epoch()

    network, balancer, random = network_of(), build_balancer(name, MIXED), generator()
    steps(network, balancer, random, 3)
    torch.rand(7)  # where the global generator stands does not matter
    again, restored, drawn = network_of(), build_balancer(name, MIXED), torch.Generator()
    again.load_state_dict(network.state_dict())
    restored.load_state_dict(balancer.state_dict())
    drawn.set_state(random.get_state())
    for parts in ((network, balancer, random), (again, restored, drawn)):
        steps(*parts, 2)
    for one, other in ((network, again), (balancer, restored)):
        for key, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[key])


@every_balancing
def test_the_global_generator_stays_as_it_is(name: str) -> None:
    network = network_of()
    before = torch.random.get_rng_state()
    balanced(name, network)
    assert torch.equal(torch.random.get_rng_state(), before)


@every_balancing
def test_gradients_are_added_to_those_that_are_there(name: str) -> None:
    network = network_of()
    balancer = build_balancer(name, MIXED)
    once = gradients(
        network, lambda: balancer.backward(network.losses(*batch(), generator()), network, generator())
    )
    balancer.backward(network.losses(*batch(), generator()), network, generator())
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, 2 * once[key])


@pytest.mark.parametrize("name", [name for name in BALANCINGS if name != "uncertainty"])
def test_one_task_is_not_balanced(name: str) -> None:
    torch.testing.assert_close(step_of(name, [1.0, -2.0]), torch.tensor([1.0, -2.0]))


def test_uncertainty_is_its_formula_for_classification_and_regression() -> None:
    network, balancer = network_of(), build_balancer("uncertainty", MIXED)
    assert isinstance(balancer, Uncertainty)
    (s_T,) = balancer.parameters()
    nn.init.uniform_(s_T, -1, 1)
    losses = network.losses(*batch(), generator())
    a, b, c = losses.tasks_T.unbind()
    expected = (
        s_T[0].neg().exp() * a + s_T[1].neg().exp() * 2 * b + s_T[2].neg().exp() * c / 2 + s_T.sum() / 2
    )
    slopes_T = 0.5 - torch.stack([a, 2 * b, c / 2]) * s_T.neg().exp()
    total = balancer.backward(losses, network, generator())
    torch.testing.assert_close(total, expected.detach())
    torch.testing.assert_close(s_T.grad, slopes_T.detach())


def test_uncertainty_settles_where_the_variance_is_the_loss() -> None:
    network = Toy([0.0], [0.0])  # both losses are 1
    balancer = build_balancer("uncertainty", network.tasks)
    (s_T,) = balancer.parameters()
    optimizer = torch.optim.SGD([s_T], lr=0.5)
    nn.init.constant_(s_T, 2.0)
    for _ in range(200):
        optimizer.zero_grad()
        losses = Losses(network.losses(torch.zeros(0), {}, generator()).tasks_T, torch.zeros(()))
        balancer.backward(losses, network, generator())
        optimizer.step()
    torch.testing.assert_close(s_T.detach(), torch.zeros(2), atol=1e-4, rtol=0)


def test_dwa_weighs_by_how_slowly_a_loss_fell_over_the_last_two_epochs() -> None:
    balancer = DWA(TaskSet(list(MIXED)[:2]))
    ones_T = torch.ones(2)

    def epoch(*batches: list[float]) -> list[float]:
        found = [float(balancer.combine(torch.tensor(losses), ones_T, generator())) for losses in batches]
        balancer.end_epoch()
        return found

    assert epoch([4.0, 1.0], [2.0, 3.0]) == [5.0, 5.0]  # means 3 and 2
    assert epoch([1.0, 2.0], [2.0, 2.0]) == [3.0, 4.0]  # means 1.5 and 2
    slow, fast = torch.softmax(torch.tensor([1.0, 0.5]) / 2, dim=0).tolist()
    assert epoch([1.0, 0.0]) == pytest.approx([2 * fast])  # the first task's loss halved
    assert slow > fast
    before = balancer.means_2T.clone()
    epoch([1.0, 1.0])
    torch.testing.assert_close(balancer.means_2T[0], before[1])


def test_dwa_takes_a_task_that_had_no_loss_for_one_that_stays() -> None:
    balancer = DWA(TaskSet(list(MIXED)[:2]))
    for losses in ([0.0, 1.0], [0.0, 1.0], [0.0, 1.0]):
        total = balancer.combine(torch.tensor(losses), torch.ones(2), generator())
        balancer.end_epoch()
        assert total == 1


def test_random_weights_have_mean_1_and_come_from_the_generator_alone() -> None:
    balancer, random = RandomWeighting(), generator()
    draws = torch.stack(
        [
            torch.stack([balancer.combine(row, torch.ones(4), random) for row in torch.eye(4)])
            for _ in range(400)
        ]
    )
    assert draws.std() > 0.1
    torch.testing.assert_close(draws.mean(), torch.tensor(1.0), atol=0.1, rtol=0)
    weights_T = torch.tensor([1.0, 2.0, 3.0, 4.0])
    one, other = generator(), generator()
    total = balancer.combine(torch.ones(4), weights_T, one)
    torch.manual_seed(5)
    assert torch.equal(balancer.combine(torch.ones(4), weights_T, other), total)
    assert torch.equal(balancer.combine(torch.ones(4), torch.ones(4), one), torch.tensor(4.0))


@pytest.mark.parametrize("name", SUMS)
def test_where_nothing_conflicts_an_aggregation_is_the_sum(name: str) -> None:
    found = step_of(name, [1.0, 0.0, 2.0], [0.5, 3.0, 0.0])
    torch.testing.assert_close(found, torch.tensor([1.5, 3.0, 2.0]), rtol=1e-3, atol=1e-3)


def test_pcgrad_by_hand() -> None:
    # g1 = (1, 0), g2 = (-1, 1): g1 . g2 = -1, so g1 becomes g1 + g2 / 2 and g2 becomes g2 + g1.
    torch.testing.assert_close(step_of("pcgrad", [1.0, 0.0], [-1.0, 1.0]), torch.tensor([0.5, 1.5]))


def test_mgda_by_hand() -> None:
    # The shortest vector between (2, 0) and (0, 1) is a (2, 0) + (1 - a) (0, 1) at a = 1/5.
    torch.testing.assert_close(
        step_of("mgda", [2.0, 0.0], [0.0, 1.0]), torch.tensor([0.4, 0.8]), rtol=1e-3, atol=1e-3
    )


def test_imtl_g_has_equal_projections_on_the_tasks_gradients() -> None:
    rows_TP = torch.tensor([[2.0, 0.0, 1.0], [-1.0, 1.0, 0.0]])
    found = step_of("imtl_g", *rows_TP.tolist())
    first, second = nn.functional.normalize(rows_TP) @ found
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("name", ["upgrad", "mgda", "dualproj", "config"])
@pytest.mark.parametrize("seed", range(5))
def test_in_a_conflict_no_loss_rises_to_first_order(name: str, seed: int) -> None:
    rows_TP = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))
    rows_TP[1] = rows_TP[1] / 2 - rows_TP[0]
    assert rows_TP[0] @ rows_TP[1] < 0
    rises_T = -rows_TP @ step_of(name, *rows_TP.tolist())
    assert (rises_T < 1e-2).all()


@every_aggregation
def test_a_parameter_of_one_task_gets_its_plain_gradient(name: str) -> None:
    for network in (network_of(), network_of(Grouped, grouping=[["a", "b"], ["c"]], split=0)):
        plain, found = balanced("fixed", network), balanced(name, network)
        assert plain.keys() == found.keys()
        alone = ("heads.", "branches.1.") if isinstance(network, Grouped) else ("heads.",)
        for key in plain:
            if key.startswith(alone):
                torch.testing.assert_close(found[key], plain[key])
    single = network_of(Single)
    plain, found = balanced("fixed", single), balanced(name, single)
    for key in plain:
        torch.testing.assert_close(found[key], plain[key])


@every_aggregation
def test_each_group_is_aggregated_by_itself(name: str) -> None:
    network = network_of(Grouped, grouping=[["a", "b"], ["c"]], split=1)
    balanced(name, network)
    weighted_T = network.losses(*batch(), generator()).tasks_T * network.task_weights_T
    prefix, branch = list(network.prefix.parameters()), list(network.branches[0].parameters())
    # The same method on the same rows, in the same order of draws: the prefix first, then the branch.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(balancing.GREATEST_SEED, (), generator=generator())))
        for parameters, reached_by in ((prefix, (0, 1, 2)), (branch, (0, 1))):
            rows = [
                torch.cat(
                    [g.flatten() for g in torch.autograd.grad(weighted_T[t], parameters, retain_graph=True)]
                )
                for t in reached_by
            ]
            build = balancing._AGGREGATORS[name]
            expected = build(torch.ones(len(rows)))(torch.stack(rows))
            found = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
            torch.testing.assert_close(found, expected)


@every_aggregation
def test_a_penalty_and_what_one_task_owns_are_added_plainly(name: str) -> None:
    network = Toy([1.0, 0.0], [-0.5, 1.0])
    losses = network.losses(torch.zeros(0), {}, generator())
    total = build_balancer(name, network.tasks).backward(losses, network, generator())
    assert torch.equal(network.own.grad, torch.tensor([3.0 + 7.0]))  # type: ignore[arg-type]
    expected = step_of(name, [1.0, 0.0], [-0.5, 1.0]) + torch.tensor([5.0, 0.0])
    torch.testing.assert_close(network.shared.grad, expected)
    assert total == 2  # both losses are 1, the penalty is 0
    assert not total.requires_grad


@every_aggregation
def test_a_task_without_labels_in_a_batch_has_no_say(name: str) -> None:
    network = network_of()
    x, targets = batch()
    targets["c"] = torch.full_like(targets["c"], torch.nan)
    balancer = build_balancer(name, MIXED)
    found = gradients(
        network, lambda: balancer.backward(network.losses(x, targets, generator()), network, generator())
    )
    two = TaskSet(list(MIXED)[:2])
    pair = Shared(backbone=BACKBONE, tasks=two)
    pair.load_state_dict({key: value for key, value in network.state_dict().items() if "heads.2" not in key})
    balancer = build_balancer(name, two)
    expected = gradients(
        pair, lambda: balancer.backward(pair.losses(x, targets, generator()), pair, generator())
    )
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected.get(key, torch.zeros_like(gradient)))


@every_aggregation
def test_a_gradient_that_is_not_finite_stays_so(name: str) -> None:
    assert not step_of(name, [torch.nan, 0.0], [-0.5, 1.0]).isfinite().all()
    assert not step_of(name, [torch.inf, 0.0], [-0.5, 1.0]).isfinite().all()


@every_aggregation
def test_every_family_can_be_aggregated(name: str) -> None:
    for network in (network_of(InterroGate), network_of(DMTG, groups=2)):
        found = balanced(name, network)
        assert all(gradient.isfinite().all() for gradient in found.values())
        assert found.keys() == balanced("fixed", network).keys()


def test_an_unknown_balancing_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"balancing: must be one of \['fixed', .*\], found 'magic'"):
        build_balancer("magic", MIXED)


@pytest.mark.parametrize("name", ["cagrad", "nash_mtl"])
def test_a_method_whose_packages_are_missing_is_refused_with_the_extra(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balancing, "BALANCINGS", tuple(known for known in BALANCINGS if known != name))
    with pytest.raises(ValueError, match=rf"balancing: '{name}' must have 'torchjd\[{name}\]' installed"):
        build_balancer(name, MIXED)
