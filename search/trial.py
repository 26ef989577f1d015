"""What one trial does: train a candidate epoch by epoch, measure it, keep a checkpoint, export it."""

import hashlib
import json
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from coterie.models.backbones.base import ImageBackbone
from coterie.models.balancing import build_balancer
from coterie.models.cost import count_cost, measure_latency_ms, measure_peak_memory_mb
from coterie.models.export import ARCHITECTURE_FILE, WEIGHTS_FILE, Preprocessing, write_architecture
from coterie.models.metrics import Evaluator
from coterie.models.static import StaticNetwork
from coterie.models.tasks import Task, TaskSet
from coterie.search.baselines import sizes_key
from coterie.search.data.base import Dataset, Split
from coterie.search.objective import (
    SplitName,
    TaskValues,
    Yardstick,
    combined_metrics,
    own_width_gain,
    task_metrics,
)
from coterie.search.recipe import recipe_of
from coterie.search.space import build_candidate
from coterie.search.store import Candidate, Ending, Measurement, Reference, StoredFile, TrialState

CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_FORMAT = "2"  # of its tensors' names; another version's are not read
MEASUREMENTS_KEPT = 100  # in a checkpoint: far more than a driver has waiting to be recorded
EVALUATED_NUMBERS = 2**20  # of inputs at once: few enough for a deep network's features to fit in memory


class Diverged(Exception):
    """The training's loss, its weights or a metric are no longer finite."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What one trial is to do; picklable.

    Attributes:
        trial_id: Names its folders.
        candidate: What to train.
        seed: Of initialisation, shuffling and noise.
        epochs: Length of the training.
        recorded: Epochs whose measurements the driver has already.
        confirms: Whether it is a confirming run, whose network is not kept.
    """

    trial_id: str
    candidate: Candidate
    seed: int
    epochs: int
    recorded: int = 0
    confirms: bool = False


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A split on the trial's device: standardised inputs [samples, *shape], labels by task [samples, ...]."""

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

    preprocessing = Preprocessing(mean=_per_channel(data.mean), std=_per_channel(data.std))
    channels = (-1, *[1] * (len(data.input_shape) - 1))
    mean = torch.tensor(preprocessing.mean).view(channels)
    std = torch.tensor(preprocessing.std).view(channels)

    def samples(split: Split) -> Samples:
        return Samples(
            inputs=((torch.tensor(split.inputs) - mean) / std).to(device),
            targets={name: _as_labels(split.targets[name]).to(device) for name in tasks.names},
        )

    return Bench(
        tasks=tasks,
        train=samples(data.train),
        validation=samples(data.validation),
        test=samples(data.test),
        preprocessing=preprocessing,
        device=device,
        devices=gpus if gpus > 0 else cpus,
    )


def _per_channel(values: float | tuple[float, ...]) -> tuple[float, ...]:
    return values if isinstance(values, tuple) else (values,)


def _as_labels(labels: NDArray[Any]) -> Tensor:
    """As losses take them: whole numbers as int64, others as float32."""
    return torch.tensor(
        labels, dtype=torch.int64 if np.issubdtype(labels.dtype, np.integer) else torch.float32
    )


class Training:
    """One training, epoch by epoch; it can be saved after each and goes on exactly where it was.

    On CUDA the losses are computed in bfloat16 where autocast does so; everything is measured in float32, as
    the exported network computes. Networks for images hold their maps with the channels last.

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
        candidate = assignment.candidate
        recipe = recipe_of(candidate)
        self._lr, self._weight_decay = float(recipe["lr"]), float(recipe["weight_decay"])
        self._batch_size = int(recipe["batch_size"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(assignment.seed)
            network = build_candidate(candidate, bench.input_shape, bench.tasks)
            self._balancer = build_balancer(str(recipe["balancing"]), bench.tasks).to(bench.device)
        self._format = (
            torch.channels_last
            if isinstance(network.backbone, ImageBackbone) and len(bench.input_shape) == 3
            else torch.contiguous_format
        )
        self.network = network.to(bench.device, memory_format=self._format)  # type: ignore[call-overload]
        self._optimizer = self._fresh_optimizer()
        self._generator = torch.Generator().manual_seed(assignment.seed)
        self._recent: deque[Measurement] = deque(maxlen=MEASUREMENTS_KEPT)
        self.epoch = 0
        self.device_seconds = 0.0

    @property
    def done(self) -> bool:
        """Whether all epochs are trained."""
        return self.epoch >= self.assignment.epochs

    def run_epoch(
        self, before_step: Callable[[Tensor, Mapping[str, Tensor]], None] = lambda x, targets: None
    ) -> Measurement:
        """Train one epoch and measure the validation split.

        Args:
            before_step: Called with the inputs and targets of each batch before it is trained on.

        Raises:
            Diverged: If the loss is not finite.
        """
        began = time.perf_counter()
        device = self._bench.device
        if self.network.begin_epoch(self.epoch, self.assignment.epochs):
            self._optimizer = self._fresh_optimizer()
        self.network.train()
        total = torch.zeros((), device=device)
        samples = self._bench.train
        order = torch.randperm(len(samples.inputs), generator=self._generator).to(device)
        for index in _batches(order, self._batch_size):
            x = samples.inputs[index].contiguous(memory_format=self._format)
            targets = {name: samples.targets[name][index] for name in self._bench.tasks.names}
            before_step(x, targets)
            self._optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                losses = self.network.losses(x, targets, self._generator)
            total += self._balancer.backward(losses, self.network, self._generator)
            if self._format is torch.channels_last:
                self._lay_out_gradients()
            self._optimizer.step()
        self._balancer.end_epoch()
        if not torch.isfinite(total):
            raise Diverged(f"the training loss is {float(total)} in epoch {self.epoch + 1}")
        self.epoch += 1
        found = self.evaluate(self.network, self._bench.validation)
        self.device_seconds += (time.perf_counter() - began) * self._bench.devices
        self._recent.append(self._measurement(found))
        return self._recent[-1]

    def conclude(self) -> StaticNetwork:
        """Settle what is not learned by gradient, and give the network that the training has come to.

        Raises:
            Diverged: If a weight is not finite.
        """
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.network.parameters()):
            raise Diverged("the last steps left weights that are not finite")
        inputs = self._bench.train.inputs
        order = torch.arange(len(inputs), device=inputs.device)
        self.network.settle(
            inputs[index].contiguous(memory_format=self._format)
            for index in _batches(order, self._batch_size)
        )
        # Measured as it is exported.
        static: StaticNetwork = self.network.prune()
        return static.to(memory_format=torch.contiguous_format)  # type: ignore[no-any-return, call-overload]

    def evaluate(self, network: nn.Module, samples: Samples) -> TaskValues:
        """Each task's metrics on a split.

        Raises:
            Diverged: If one is not finite.
        """
        found = evaluate(network, samples, self._bench.tasks)
        for name, value in task_metrics(found).items():
            if not math.isfinite(value):
                raise Diverged(f"{name} is {value} after epoch {self.epoch}")
        return found

    def finish(self, folder: Path) -> Ending:
        """Prune, measure the static network on validation and test, and write it to `folder`.

        Raises:
            Diverged: If a weight or a metric is not finite.
        """
        began = time.perf_counter()
        bench = self._bench
        network = self.conclude()
        validation = self.evaluate(network, bench.validation)
        test = evaluate(network, bench.test, bench.tasks)  # reported as it is: it decides nothing
        cost = count_cost(network, bench.input_shape)
        latency = measure_latency_ms(network, bench.input_shape, bench.device)
        memory = measure_peak_memory_mb(network, bench.input_shape, bench.device)
        self.device_seconds += (time.perf_counter() - began) * bench.devices
        costs = {
            "macs": float(cost.macs),
            "params": float(cost.params),
            "latency_ms": latency,
            "peak_memory_mb": memory,
            "train_device_seconds": self.device_seconds,
        }
        assert self._yardstick is not None  # candidates are always measured against one
        values = self._all_values(validation, self._yardstick, "validation") | costs
        test_values = _finite(self._all_values(test, self._yardstick, "test")) | costs
        candidate = self.assignment.candidate
        write_architecture(
            folder,
            network,
            family=candidate.family,
            tasks=bench.tasks,
            backbone=self.network.backbone,
            grouping=self.network.grouping,
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
                name: {"validation": dict(validation[name]), "test": _finite(test[name])}
                for name in bench.tasks.names
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
        tensors |= {f"balancer.{name}": value for name, value in self._balancer.state_dict().items()}
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
        metadata = {"format": CHECKPOINT_FORMAT, "training": json.dumps(about)}
        try:
            save_file(contiguous, part, metadata=metadata)
            part.replace(folder / CHECKPOINT)
        finally:
            part.unlink(missing_ok=True)  # half of one would keep a full disk full

    def restore(self, folder: Path) -> list[Measurement]:
        """Go on from the checkpoint in `folder`.

        Returns:
            The measurements of its last epochs, oldest first; empty without a checkpoint of this version's
            format: then the training begins anew.
        """
        path = folder / CHECKPOINT
        if not path.exists():
            return []
        with safe_open(path, framework="pt", device=str(self._bench.device)) as file:
            metadata = file.metadata()
            if metadata.get("format") != CHECKPOINT_FORMAT:
                return []
            about = json.loads(metadata["training"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        self.network.restore(_under("network.", tensors))
        self.network.to(memory_format=self._format)
        self._balancer.load_state_dict(_under("balancer.", tensors))
        self._optimizer = self._fresh_optimizer()
        self._restore_optimizer(_under("optimizer.", tensors))
        self._generator.set_state(tensors["generator"].cpu())
        self.epoch = about["epoch"]
        self.device_seconds = about["device_seconds"]
        self._recent.extend(Measurement(**entry) for entry in about["measurements"])
        return list(self._recent)

    def _fresh_optimizer(self) -> torch.optim.Optimizer:
        groups = self.network.parameter_groups(self._lr, self._weight_decay)
        balancing = list(self._balancer.parameters())
        if balancing:
            groups.append({"params": balancing, "lr": self._lr, "weight_decay": 0.0})
        return torch.optim.Adam(groups, fused=True)

    def _restore_optimizer(self, state: Mapping[str, Tensor]) -> None:
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            index, key = name.split(".", 1)
            entries.setdefault(int(index), {})[key] = _laid_out_as(parameters[int(index)], value)
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": entries, "param_groups": groups})

    def _lay_out_gradients(self) -> None:
        """Give each gradient its parameter's strides: fused Adam goes through memory and asks for none."""
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad = _laid_out_as(parameter, parameter.grad)

    def _measurement(self, found: TaskValues) -> Measurement:
        values: dict[str, float | None] = {}
        if self._yardstick is not None:
            cost = self.network.expected_cost()
            values = self._all_values(found, self._yardstick, "validation")
            # Gates that are no numbers: the next epoch's loss, or the end, says that it diverged.
            values |= _finite({"macs": float(cost.macs), "params": float(cost.params)})
        return Measurement(
            epoch=self.epoch,
            values=values,
            tasks=found,
            device_seconds=self.device_seconds,
            worker=worker_name(),
        )

    def _all_values(
        self, found: TaskValues, yardstick: Yardstick, split: SplitName
    ) -> dict[str, float | None]:
        tasks = self._bench.tasks
        sizes = sizes_key(self.assignment.candidate)
        return {
            **combined_metrics(found, yardstick.on(split), tasks),
            "delta_m_own_width": own_width_gain(found, yardstick, sizes, split, tasks),
            **task_metrics(found),
        }


@torch.no_grad()
def evaluate(network: nn.Module, samples: Samples, tasks: TaskSet) -> dict[str, dict[str, float]]:
    """Each task's metrics on a split, in eval mode."""
    network.eval()
    evaluator = Evaluator(tasks)
    size = max(1, EVALUATED_NUMBERS // samples.inputs[0].numel())
    for start in range(0, len(samples.inputs), size):
        batch = slice(start, start + size)
        targets = {name: samples.targets[name][batch] for name in tasks.names}
        evaluator.update(network(samples.inputs[batch]), targets)
    return evaluator.compute()


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
    network = training.conclude()
    return Reference(
        validation=training.evaluate(network, bench.validation)[task.name],
        test=evaluate(network, bench.test, alone.tasks)[task.name],
        device_seconds=training.device_seconds,
        latency_ms=measure_latency_ms(network, bench.input_shape, bench.device),
    )


def worker_name() -> str:
    """Host and process id of this process."""
    return f"{socket.gethostname()}:{os.getpid()}"


def _finite(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """None in place of what is no number: JSON has no word for it."""
    return {
        name: None if value is None or not math.isfinite(value) else value for name, value in values.items()
    }


def _batches(order: Tensor, size: int) -> Iterator[Tensor]:
    """Cut an order of samples into batches; a single one left over joins those before it.

    Batch norm has nothing to normalise by in a batch of one.
    """
    batches = list(torch.split(order, size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    yield from batches


def _laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """The value with the parameter's strides; one of another shape, such as a step count, is left alone."""
    if value.shape != parameter.shape or value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _describe(path: Path) -> StoredFile:
    with path.open("rb") as file:
        return StoredFile(size=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())
