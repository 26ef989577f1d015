"""What no numeric argument may be, though some of it compares or counts with one."""

import math

import numpy
import torch

NO_NUMBERS = (
    "1",
    None,
    [0.5],
    0.5j,
    True,
    torch.tensor(0.5),
    numpy.float64(0.5),
    math.nan,
    math.inf,
    10**400,
)
