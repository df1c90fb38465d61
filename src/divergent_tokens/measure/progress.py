"""How far along a long piece of work is, told to whoever wants to show it."""

from typing import Protocol


class Progress(Protocol):
    """Called as work goes on; the command line draws a bar, a notebook may do as it likes."""

    def __call__(self, stage: str, done: int, total: int, unit: str) -> None:
        """Say that `done` of `total` units of a stage are finished; at its end both are equal."""


def silent(stage: str, done: int, total: int, unit: str) -> None:
    """Show nothing."""
