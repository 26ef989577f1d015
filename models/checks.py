"""The rules that a number given from outside has to keep."""

import reprlib

GREATEST_NUMBER = (2 - 2**-23) * 2.0**127  # of float32, which all of them end in; beyond is infinite


def check_number(
    name: str,
    value: object,
    low: float,
    high: float = GREATEST_NUMBER,
    *,
    above: bool = False,
    below: bool = False,
) -> None:
    """Check that `value` is an int or a float, and no subclass of them, from `low` to `high`.

    Args:
        name: What the message calls it.
        value: What was given.
        low: The least value.
        high: The greatest one.
        above: Whether `low` itself is refused.
        below: Whether `high` itself is.

    Raises:
        ValueError: If it is not, or is not a number.
    """
    if isinstance(value, int | float) and type(value) in {int, float}:
        fits = low <= value <= high  # never of a NaN
        if fits and not (above and value == low) and not (below and value == high):
            return
    if high == GREATEST_NUMBER:
        rule = f"a finite number {'above' if above else 'from'} {low:g}"
    else:
        start = f"above {low:g} and" if above else f"from {low:g} to"
        end = "below " if below else "at most " if above else ""
        rule = f"a number {start} {end}{high:g}"
    raise ValueError(f"{name}: must be {rule}, found {reprlib.repr(value)}")


def check_whole_number(name: str, value: object, low: int, high: int) -> None:
    """Check that `value` is an int, and no bool, from `low` to `high`.

    Raises:
        ValueError: If it is not.
    """
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name}: must be a whole number from {low} to {high}, found {reprlib.repr(value)}")
