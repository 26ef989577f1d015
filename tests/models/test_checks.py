from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.models.checks import GREATEST_NUMBER, check_number, check_whole_number
from tests.models.not_numbers import NO_NUMBERS

numbers = st.integers(-3, 3) | st.floats(-3, 3)


@given(numbers, st.integers(-3, 0), st.integers(0, 3), st.booleans(), st.booleans())
def test_a_number_is_accepted_exactly_between_its_bounds(
    value: float, low: int, high: int, above: bool, below: bool
) -> None:
    inside = (value > low if above else value >= low) and (value < high if below else value <= high)
    with nullcontext() if inside else pytest.raises(ValueError, match="share: must be a number "):
        check_number("share", value, low, high, above=above, below=below)


@pytest.mark.parametrize(
    ("above", "below", "rule"),
    [
        (False, False, "from 0 to 1"),
        (False, True, "from 0 to below 1"),
        (True, False, "above 0 and at most 1"),
        (True, True, "above 0 and below 1"),
    ],
)
def test_the_message_says_the_rule(above: bool, below: bool, rule: str) -> None:
    with pytest.raises(ValueError, match=f"^probe: must be a number {rule}, found -1$"):
        check_number("probe", -1, 0, 1, above=above, below=below)


def test_without_an_upper_bound_a_number_is_finite_as_float32() -> None:
    check_number("lr", GREATEST_NUMBER, 0)
    check_number("lr", 10**38, 0)
    for value in (GREATEST_NUMBER * 1.001, 10**39):
        with pytest.raises(ValueError, match="lr: must be a finite number from 0, found "):
            check_number("lr", value, 0)


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="lr: must be a finite number above 0, found "):
        check_number("lr", value, 0, above=True)
    with pytest.raises(ValueError, match="seed: must be a whole number from 0 to 1, found "):
        check_whole_number("seed", value, 0, 1)
