"""The error that a user can mend."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something in the user's configuration, files or data is wrong; the message says what, and what is allowed.

    The command line prints it as one line. Any other error is shown with its traceback, because it is a bug.
    """


@contextmanager
def user_errors(*others: type[Exception]) -> Iterator[None]:
    """Around code that reads what the user gave: a ValueError or OSError in it becomes a :class:`UserError`.

    FileNotFoundError and FileExistsError pass unchanged; the command line prints them as one line too.

    Args:
        others: further errors that become a `UserError` here.
    """
    kinds: tuple[type[Exception], ...] = (ValueError, OSError, *others)
    try:
        yield
    except (UserError, FileNotFoundError, FileExistsError):
        raise
    except kinds as error:
        raise UserError(str(error)) from error


class NotFiniteError(UserError, RuntimeError):
    """A number that has to be finite is NaN or infinite; the message says which."""
