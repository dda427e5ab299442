"""SIGINT and SIGTERM: the process ends at once, or training ends after its step."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Stopped", "notice", "on_signal", "stop"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The process was asked to stop.

    Attributes:
        number: the signal.
    """

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.number = number


def stop(number: int) -> None:
    """Ends what is running, as Ctrl-C does by default."""
    raise Stopped(number)


@contextmanager
def on_signal(act: Callable[[int], None]) -> Iterator[None]:
    """Has SIGINT and SIGTERM call a function; only the main thread of a process can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        act(number)

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def notice(text: str) -> None:
    """Tells a person at a terminal that the signal arrived."""
    if sys.stderr.isatty():
        print(f"\nmor: {text}", file=sys.stderr, flush=True)
