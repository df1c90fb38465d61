"""Progress bars for long work: one line a stage, with its speed and the time left."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit, _, rest = task.fields["unit"].partition(", ")
        text = f"{speed:,.0f} {unit}/s" if speed and unit else ""
        return Text(f"{text}, {rest}" if rest else text, style="dim")


class Bars:
    """Draws what `Progress` callbacks tell (see measure/progress.py)."""

    def __init__(self, console: Console) -> None:
        """Draw on this console."""
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            _Speed(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the bars as they stand."""
        self._progress.stop()

    def __call__(self, stage: str, done: int, total: int, unit: str) -> None:
        """Show that `done` of `total` units of the stage are finished.

        What stands behind a comma in `unit` is shown as it is: a loss, say.
        """
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total, unit=unit)
        self._progress.update(self._tasks[stage], completed=done, total=total, unit=unit)
