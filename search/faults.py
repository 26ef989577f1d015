"""What is wrong with a document from outside, named so that its sender finds the place."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a spec.

    Attributes:
        pointer: JSON pointer (RFC 6901) to it.
        detail: What is wrong, and what would be right.
    """

    pointer: str
    detail: str


class SpecError(ValueError):
    """A spec that asks for what does not exist or cannot be.

    Attributes:
        faults: All that was found, at least one.
    """

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("; ".join(f"{fault.pointer}: {fault.detail}" for fault in faults))
        self.faults = tuple(faults)


def escape(part: str | int) -> str:
    """One reference token of a JSON pointer (RFC 6901)."""
    return str(part).replace("~", "~0").replace("/", "~1")
