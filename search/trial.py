"""What one trial does: train a candidate epoch by epoch, measure it, keep a checkpoint, export it."""

import hashlib
import json
import os
import shutil
import socket
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from coterie.models.backbones import BACKBONES
from coterie.models.cost import count_cost, measure_latency_ms
from coterie.models.export import ARCHITECTURE_FILE, WEIGHTS_FILE, Preprocessing, write_architecture
from coterie.models.families import build_network
from coterie.models.metrics import task_errors
from coterie.models.tasks import Task, TaskSet
from coterie.search.data.base import Dataset, Split
from coterie.search.objective import Yardstick, combined_metrics, task_metrics
from coterie.search.space import RECIPE, backbone_dimensions
from coterie.search.store import Candidate, Ending, Measurement, Reference, StoredFile, TrialState

CHECKPOINT = "checkpoint.safetensors"
MEASUREMENTS_KEPT = 100  # in a checkpoint: far more than a driver has waiting to be recorded
RECIPE_NAMES = frozenset(dimension.name for dimension in RECIPE)


class Diverged(Exception):
    """The training's loss is no longer finite."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What one trial is to do; picklable.

    Attributes:
        trial_id: Names its folders.
        candidate: What to train.
        seed: Of initialisation, shuffling and noise.
        epochs: Length of the training.
        recorded: Epochs whose measurements the driver has already.
    """

    trial_id: str
    candidate: Candidate
    seed: int
    epochs: int
    recorded: int = 0


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A split on the trial's device: standardised inputs [samples, *shape], targets by task [samples]."""

    inputs: Tensor
    targets: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What the trials of a job share in one process.

    Attributes:
        tasks: The job's.
        train: Trained on.
        validation: Measured after each epoch.
        test: Measured once, at the end, for the report.
        preprocessing: How the inputs were standardised.
        device: Where to train.
        devices: How many devices a trial reserves, for the charge: its GPUs, or its CPUs where it has none.
    """

    tasks: TaskSet
    train: Samples
    validation: Samples
    test: Samples
    preprocessing: Preprocessing
    device: torch.device
    devices: float

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train.inputs.shape[1:])


def make_bench(tasks: TaskSet, data: Dataset, *, cpus: float, gpus: float) -> Bench:
    """Prepare this process for trials that reserve these resources: device, threads, data on the device."""
    torch.set_num_threads(max(1, int(cpus)))
    device = torch.device("cuda" if gpus > 0 else "cpu")

    def samples(split: Split) -> Samples:
        return Samples(
            inputs=((torch.tensor(split.inputs) - data.mean) / data.std).to(device),
            targets={name: torch.tensor(split.targets[name]).to(device) for name in tasks.names},
        )

    return Bench(
        tasks=tasks,
        train=samples(data.train),
        validation=samples(data.validation),
        test=samples(data.test),
        preprocessing=Preprocessing(mean=(data.mean,), std=(data.std,)),
        device=device,
        devices=gpus if gpus > 0 else cpus,
    )


class Training:
    """One training, epoch by epoch; it can be saved after each and goes on exactly where it was.

    Args:
        assignment: What to train.
        bench: On what.
        yardstick: What gains are measured against; None leaves the combined metrics out (references).

    Raises:
        ValueError: If the candidate is impossible.
    """

    def __init__(self, assignment: Assignment, bench: Bench, yardstick: Yardstick | None) -> None:
        self.assignment = assignment
        self._bench = bench
        self._yardstick = yardstick
        parameters = dict(assignment.candidate.parameters)
        kind = BACKBONES[assignment.candidate.backbone]
        shape = {
            dim.name: parameters.pop(dim.name) for dim in backbone_dimensions(assignment.candidate.backbone)
        }
        recipe = {name: parameters.pop(name) for name in RECIPE_NAMES}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(assignment.seed)
            self.network = build_network(
                assignment.candidate.family,
                backbone=kind(input_shape=bench.input_shape, **shape),
                tasks=bench.tasks,
                parameters=parameters,
            ).to(bench.device)
        self._batch_size = int(recipe["batch_size"])
        groups = self.network.parameter_groups(float(recipe["lr"]), float(recipe["weight_decay"]))
        self._optimizer = torch.optim.Adam(groups, fused=True)
        self._generator = torch.Generator().manual_seed(assignment.seed)
        self._recent: deque[Measurement] = deque(maxlen=MEASUREMENTS_KEPT)
        self.epoch = 0
        self.device_seconds = 0.0

    @property
    def done(self) -> bool:
        """Whether all epochs are trained."""
        return self.epoch >= self.assignment.epochs

    def run_epoch(self) -> Measurement:
        """Train one epoch and measure the validation split.

        Raises:
            Diverged: If the loss is not finite.
        """
        began = time.perf_counter()
        self.network.train()
        total = torch.zeros((), device=self._bench.device)
        samples = self._bench.train
        order = torch.randperm(len(samples.inputs), generator=self._generator).to(self._bench.device)
        for index in torch.split(order, self._batch_size):
            targets = {name: samples.targets[name][index] for name in self._bench.tasks.names}
            loss = self.network.training_loss(samples.inputs[index], targets, self._generator)
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            total += loss.detach()
        if not torch.isfinite(total):
            raise Diverged(f"the training loss is {float(total)} in epoch {self.epoch + 1}")
        self.epoch += 1
        errors = evaluate(self.network, self._bench.validation, self._bench.tasks)
        self.device_seconds += (time.perf_counter() - began) * self._bench.devices
        self._recent.append(self._measurement(errors))
        return self._recent[-1]

    def finish(self, folder: Path) -> Ending:
        """Prune, measure the static network on validation and test, and write it to `folder`.

        Raises:
            Diverged: If a weight is not finite.
        """
        began = time.perf_counter()
        bench = self._bench
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.network.parameters()):
            raise Diverged("the last steps left weights that are not finite")
        network = self.network.prune()
        validation = evaluate(network, bench.validation, bench.tasks)
        test = evaluate(network, bench.test, bench.tasks)
        cost = count_cost(network, bench.input_shape)
        latency = measure_latency_ms(network, bench.input_shape, bench.device)
        self.device_seconds += (time.perf_counter() - began) * bench.devices
        costs = {
            "macs": float(cost.macs),
            "params": float(cost.params),
            "latency_ms": latency,
            "train_device_seconds": self.device_seconds,
        }
        assert self._yardstick is not None  # candidates are always measured against one
        values = self._all_values(validation, self._yardstick.validation) | costs
        test_values = self._all_values(test, self._yardstick.test) | costs
        candidate = self.assignment.candidate
        write_architecture(
            folder,
            network,
            family=candidate.family,
            preprocessing=bench.preprocessing,
            metadata={
                "trial": self.assignment.trial_id,
                "seed": self.assignment.seed,
                "epochs": self.epoch,
                "candidate": dict(candidate.parameters),
                "metrics": {"validation": values, "test": test_values},
            },
        )
        grouping = self.network.grouping
        return Ending(
            state=TrialState.COMPLETED,
            values=dict(values),
            test=dict(test_values),
            tasks={
                task.name: {
                    "validation": {task.metric: validation[task.name]},
                    "test": {task.metric: test[task.name]},
                }
                for task in bench.tasks
            },
            grouping=None if grouping is None else grouping.names(bench.tasks),
            epochs=self.epoch,
            device_seconds=self.device_seconds,
            files={name: _describe(folder / name) for name in (ARCHITECTURE_FILE, WEIGHTS_FILE)},
        )

    def save(self, folder: Path) -> None:
        """Write the checkpoint, atomically: a kill leaves the old one or the new one, never half of one.

        It holds the latest measurements too, since a driver that dies may not have recorded them yet.
        """
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        state = self._optimizer.state_dict()
        for index, entry in state["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in entry.items()}
        tensors["generator"] = self._generator.get_state()
        about = {
            "epoch": self.epoch,
            "device_seconds": self.device_seconds,
            "measurements": [asdict(measurement) for measurement in self._recent],
        }
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{CHECKPOINT}.{os.getpid()}.part"
        contiguous = {name: value.contiguous() for name, value in tensors.items()}
        save_file(contiguous, part, metadata={"training": json.dumps(about)})
        part.replace(folder / CHECKPOINT)

    def restore(self, folder: Path) -> list[Measurement]:
        """Go on from the checkpoint in `folder`.

        Returns:
            The measurements of its last epochs, oldest first; empty without a checkpoint.
        """
        path = folder / CHECKPOINT
        if not path.exists():
            return []
        with safe_open(path, framework="pt", device=str(self._bench.device)) as file:
            about = json.loads(file.metadata()["training"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        self.network.load_state_dict(_under("network.", tensors))
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in _under("optimizer.", tensors).items():
            index, key = name.split(".", 1)
            entries.setdefault(int(index), {})[key] = value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": entries, "param_groups": groups})
        self._generator.set_state(tensors["generator"].cpu())
        self.epoch = about["epoch"]
        self.device_seconds = about["device_seconds"]
        self._recent.extend(Measurement(**entry) for entry in about["measurements"])
        return list(self._recent)

    def _measurement(self, errors: Mapping[str, float]) -> Measurement:
        values = {} if self._yardstick is None else self._all_values(errors, self._yardstick.validation)
        return Measurement(
            epoch=self.epoch,
            values=dict(values),
            tasks={task.name: {task.metric: errors[task.name]} for task in self._bench.tasks},
            device_seconds=self.device_seconds,
            worker=worker_name(),
        )

    def _all_values(
        self, errors: Mapping[str, float], yardstick: Mapping[str, float]
    ) -> dict[str, float | None]:
        tasks = self._bench.tasks
        return {**combined_metrics(errors, yardstick, tasks), **task_metrics(errors, tasks)}


@torch.no_grad()
def evaluate(network: nn.Module, samples: Samples, tasks: TaskSet) -> dict[str, float]:
    """Each task's metric on a split, in eval mode."""
    network.eval()
    return task_errors(network(samples.inputs), samples.targets, tasks)


def train_reference(task: Task, candidate: Candidate, seed: int, epochs: int, bench: Bench) -> Reference:
    """Train the single-task network of one task.

    Args:
        task: The one task; its weight is left out, since jobs that weigh it differently share the reference.
        candidate: The family `single` with the yardstick's width and recipe.
        seed: Of the training.
        epochs: Its length.
        bench: The job's data.
    """
    alone = replace(bench, tasks=TaskSet([replace(task, weight=1.0)]))
    training = Training(
        Assignment(trial_id="", candidate=candidate, seed=seed, epochs=epochs), alone, yardstick=None
    )
    while not training.done:
        training.run_epoch()
    network = training.network.prune()
    return Reference(
        validation={task.metric: evaluate(network, bench.validation, alone.tasks)[task.name]},
        test={task.metric: evaluate(network, bench.test, alone.tasks)[task.name]},
        device_seconds=training.device_seconds,
        latency_ms=measure_latency_ms(network, bench.input_shape, bench.device),
    )


def worker_name() -> str:
    """Host and process id of this process."""
    return f"{socket.gethostname()}:{os.getpid()}"


def drop_checkpoint(folder: Path) -> None:
    """Delete a trial's checkpoint, if there is one."""
    shutil.rmtree(folder, ignore_errors=True)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _describe(path: Path) -> StoredFile:
    content = path.read_bytes()
    return StoredFile(size=len(content), sha256=hashlib.sha256(content).hexdigest())
