"""SIGTERM, with which schedulers announce that a job will be taken off its machine."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

PREEMPTED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command, run again, will do


class Preempted(Exception):
    """SIGTERM came; what was finished is on disk, and the same command goes on from there."""


class TerminationRequest:
    """Whether SIGTERM came, for a loop that stops at its next safe point."""

    received = False


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise `Preempted` wherever the main thread stands, so that `finally` blocks clean up."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise Preempted("stopped by SIGTERM; the same command resumes")

    with _handler(interrupt):
        yield


@contextmanager
def sigterm_requests() -> Iterator[TerminationRequest]:
    """Let SIGTERM only be noted."""
    request = TerminationRequest()

    def note(signum: int, frame: FrameType | None) -> None:
        request.received = True

    with _handler(note):
        yield request


@contextmanager
def _handler(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, handler)
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
