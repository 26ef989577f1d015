"""A static network in the forms that other programs run: ONNX, and a program of torch.export.

Both are one file, take raw inputs of any batch size in float32, and need nothing of Coterie.
`python -m coterie.models.convert FOLDER {onnx,pt2} PATH` converts what is in an architecture's folder.
"""

import copy
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from coterie.models.export import load_architecture, replace_file
from coterie.models.graph import INPUT
from coterie.models.static import StaticNetwork

ONNX_OPSET = 18  # what torch's translations are written in: no other needs a conversion
MAX_ONNX_BYTES = 2**31 - 2**24  # a protobuf message has less than 2 GiB; the layers take far less than 16 MiB
EXAMPLE_BATCH = 2  # tracing takes 0 and 1 for constants
FAULTY = 2  # exit status: the folder, the form or the path is at fault


def write_onnx(network: StaticNetwork, path: Path) -> None:
    """Write `network` as one ONNX file, whole or not at all.

    Its input is called `input` (with underscores behind it where a task has that name), its outputs have the
    tasks' names; the first axis of all of them is `batch`.

    Raises:
        ValueError: If the weights are too large for one file.
        OSError: If the file can't be written.
    """
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    if size > MAX_ONNX_BYTES:
        raise ValueError(
            f"network: must have at most {MAX_ONNX_BYTES} bytes of weights for ONNX, found {size}"
        )
    frozen, example = _prepare(network)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            frozen,
            (example,),
            dynamo=True,
            opset_version=ONNX_OPSET,
            dynamic_shapes=({0: "batch"},),
            verbose=False,
        )
    assert program is not None
    _rename(program, list(network.graph.outputs))
    replace_file(path, program.model_proto.SerializeToString())


def write_pt2(network: StaticNetwork, path: Path) -> None:
    """Write `network` as a file for `torch.export.load`, whole or not at all.

    The loaded program's `module()` takes the inputs and gives {task name: output}.

    Raises:
        OSError: If the file can't be written.
    """
    frozen, example = _prepare(network)
    content = io.BytesIO()
    with _quiet(), torch.no_grad():
        batch = torch.export.Dim("batch")
        program = torch.export.export(frozen, (example,), dynamic_shapes=({0: batch},))
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # it names this machine's folders
        torch.export.save(program, content)
    replace_file(path, content.getvalue())


WRITERS: Mapping[str, Callable[[StaticNetwork, Path], None]] = {"onnx": write_onnx, "pt2": write_pt2}


def main(arguments: Sequence[str]) -> int:
    """Convert an architecture's folder; give the exit status, and on stderr a line of what is at fault."""
    try:
        if len(arguments) != 3 or arguments[1] not in WRITERS:
            raise ValueError("usage: python -m coterie.models.convert FOLDER {onnx,pt2} PATH")
        folder, form, path = arguments
        WRITERS[form](load_architecture(Path(folder)), Path(path))
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{' '.join(str(error).split())}\n")
        return FAULTY
    return 0


def _prepare(network: StaticNetwork) -> tuple[StaticNetwork, Tensor]:
    """Give a copy in eval mode on the CPU, and an example of its input."""
    return copy.deepcopy(network).cpu().eval(), torch.zeros(EXAMPLE_BATCH, *network.graph.input_shape)


def _rename(program: torch.onnx.ONNXProgram, tasks: Sequence[str]) -> None:
    """Name the input and the outputs for their reader, and leave out what the exporter notes for itself."""
    graph = program.model.graph
    values = list(graph.initializers.values())
    for node in graph:
        node.metadata_props.clear()  # among it the folders of this machine
        values.extend(node.outputs)
    taken = {*tasks, *(value.name or "" for value in values)}
    for value in values:
        if value.name is not None and value.name in tasks:
            value.name = _free_name(value.name, taken)
    for value, task in zip(graph.outputs, tasks, strict=True):
        value.name = task
    graph.inputs[0].name = _free_name(INPUT, taken)


def _free_name(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what torch says of its own code while it exports."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
