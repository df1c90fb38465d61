"""Interrupts and the like: nothing is left half written, and the exit code says what came."""

import os
import signal
import threading
from collections.abc import Callable

from divergent_tokens.cli.output import BY_SIGNAL, say

received: list[int] = []
"""The signals that came since `main` began."""
remarks: list[str] = []
"""What else is to be said of an interrupted command."""


def on_signals(handler: Callable[[int, object], None] | signal.Handlers) -> None:
    """Have interrupts, SIGTERM and the terminal's end handled, but for what the parent ignores."""
    if threading.current_thread() is not threading.main_thread():  # only that one gets signals
        return
    ours = (signal.SIG_DFL, signal.default_int_handler, leave_at_once, tidy_up)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) in ours:
            signal.signal(number, handler)


def leave_at_once(number: int, _frame: object) -> None:
    """While packages are imported nothing is half written, and an exception makes torch abort."""
    os._exit(say(stopped_by(number), BY_SIGNAL + number))


def tidy_up(number: int, _frame: object) -> None:
    """Raise KeyboardInterrupt, so that whatever is half written is taken away."""
    received.append(number)
    if len(received) == 1 or number != signal.SIGINT:
        raise KeyboardInterrupt
    # Who strikes ctrl-c twice must not interrupt the tidying up.


def stopped_by(number: int) -> str:
    """What is said of a command that a signal ended."""
    word = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    return "; ".join((word, "nothing was left half written", *remarks))
