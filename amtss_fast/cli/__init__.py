"""The command line `amtss-fast`; each module is one command, `common` what several of them share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from amtss_fast.cli import add_language, cache, check, demo, doctor, evaluate, predict, report, teachers, train
from amtss_fast.cli.endings import Parser, can_be_mended, hang_up, interrupted, message_of, say, terminable

_COMMANDS = {
    "demo": demo,
    "check": check,
    "train": train,
    "cache": cache,
    "teachers": teachers,
    "add-language": add_language,
    "evaluate": evaluate,
    "predict": predict,
    "report": report,
    "doctor": doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status.

    An error that the user can mend is printed as one line, perhaps with a list below it, and gives the status 2, as a
    mistyped argument does; so are a missing right, a full disk and too little memory. Ctrl-C gives 130, SIGTERM 143.
    Any other error is raised.
    """
    # Torch's threads wait for each other in loops that keep their cores busy. A command lets them sleep: beside another
    # process such a loop takes the time that the process needs. OpenMP reads this when torch is loaded.
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    chosen = _parser().parse_args(arguments)
    command = _COMMANDS[chosen.command]
    name = f"amtss-fast {chosen.command}"
    parser = Parser(
        prog=name,
        description=f"{command.SUMMARY[0].upper()}{command.SUMMARY[1:]}.\n\n{command.DETAILS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    # Overrides may stand before and after options.
    options = parser.parse_intermixed_args(chosen.arguments)
    try:
        with terminable():
            command.run(options)
            # A reader that has closed the pipe shows here at the latest.
            sys.stdout.flush()
    except KeyboardInterrupt as stop:
        if chosen.trace:
            raise
        # Ctrl-C also stops `| tee log`.
        hang_up()
        return interrupted(stop, name, getattr(command, "INTERRUPTED", ""))
    except Exception as error:
        if chosen.trace or not can_be_mended(error):
            raise
        closed = hang_up()
        if closed is not None and isinstance(error, BrokenPipeError):
            return closed
        return say(f"{name}: {message_of(error)}", 2)
    return 0


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, _COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {command.SUMMARY}" for name, command in _COMMANDS.items())
    parser = Parser(
        prog="amtss-fast",
        usage="%(prog)s [-h] [--trace] COMMAND ...",
        description="Distil several teachers into one multilingual student.",
        epilog=f"commands:\n{commands}\n\namtss-fast COMMAND --help shows the arguments of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--trace", action="store_true", help="show the traceback of every error")
    parser.add_argument("command", choices=_COMMANDS, metavar="COMMAND", help="one of the commands below")
    # The parser of the command reads them.
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help=argparse.SUPPRESS)
    return parser
