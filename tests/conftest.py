"""What holds for the whole suite."""

import dataclasses
import signal
import sys

import pytest
import torch

from divergent_tokens import cli

# In the background of a shell interrupts are ignored, by every process that is started from there.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # tiny networks gain nothing from more, and xdist brings its own processes


@dataclasses.dataclass
class Left:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def _signals():
    """Main leaves its handlers behind, since its process is about to end."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def dtm(_signals, monkeypatch, capsys):
    """`dtm ARGUMENTS` in this process; what it said and how it left."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["dtm", *map(str, arguments)])
        capsys.readouterr()  # what the test's own preparations printed
        with pytest.raises(SystemExit) as left:
            cli.main()
        return Left(left.value.code or 0, *capsys.readouterr())

    return run
