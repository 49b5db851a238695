"""How a command ends other than well: messages, exit statuses, signals."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

from amtss_fast._compat.progress import close_bars
from amtss_fast.errors import UserError


class Parser(argparse.ArgumentParser):
    """Errors are messages like those of a command."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n  {self.prog} --help shows what is allowed\n")


class Terminated(KeyboardInterrupt):
    """SIGTERM: everything ends as after Ctrl-C."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM raises :class:`Terminated`, so that what is half written is removed."""

    def stop(*_: Any) -> NoReturn:
        raise Terminated

    # A launcher may have a handler of its own, and only the main thread may set one.
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def say(message: str, status: int) -> int:
    """Prints a message for the user and returns the exit status."""
    close_bars()
    first, *rest = [line.rstrip() for line in message.splitlines() if line.strip()]
    print("\n".join([first, *(line if line.startswith("  ") else f"  {line}" for line in rest)]), file=sys.stderr)
    return status


def interrupted(stop: KeyboardInterrupt, command: str, advice: str) -> int:
    """Says that a command was interrupted, and how it goes on; returns the status that shells give such commands."""
    what, signal_ = ("terminated", signal.SIGTERM) if isinstance(stop, Terminated) else ("interrupted", signal.SIGINT)
    # A terminal shows ^C where the cursor was.
    print(file=sys.stderr)
    return say(f"{command}: {what}{'; ' if advice else ''}{advice}", 128 + signal_)


def hang_up() -> int | None:
    """Gives up outputs that cannot be written any more; the exit status if a reader has gone, None if none has.

    What is left for such an output would fail once more when Python ends.
    """
    status = None
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError, AttributeError):
            try:
                place = stream.fileno()
                stream.flush()
                # An output without a buffer has nothing left that could fail: the system knows that the reader is gone.
                poll = select.poll()
                poll.register(place, select.POLLOUT)
                gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
            except io.UnsupportedOperation:
                continue
            except OSError as error:
                gone = error.errno == errno.EPIPE
                os.dup2(os.open(os.devnull, os.O_WRONLY), place)
            if gone:
                os.dup2(os.open(os.devnull, os.O_WRONLY), place)
                status = 128 + signal.SIGPIPE
    return status


def can_be_mended(error: Exception) -> bool:
    """Whether a user can mend it; anything else is a bug."""
    return isinstance(error, (UserError, OSError, ImportError)) or _is_out_of_memory(error)


def message_of(error: Exception) -> str:
    """What it says, with the file that it is about."""
    if _is_out_of_memory(error):
        said = " ".join(str(error).split())
        return f"out of memory{': ' if said else ''}{said}\nmemory.budget fits a training into the memory that there is"
    if isinstance(error, OSError) and error.strerror:
        files = [str(file) for file in (error.filename, error.filename2) if file is not None]
        return ": ".join([error.strerror, *files])
    return str(error) if str(error).strip() else type(error).__name__


def _is_out_of_memory(error: Exception) -> bool:
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    # torch is not loaded for this: commands load it after what it reads from the environment is set.
    torch = sys.modules.get("torch")
    return on_cpu or isinstance(error, MemoryError if torch is None else (MemoryError, torch.OutOfMemoryError))
