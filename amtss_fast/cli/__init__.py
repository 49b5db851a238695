"""The command line `amtss-fast`; each module is one command, `common` what several of them share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from amtss_fast.cli import add_language, cache, demo, doctor, evaluate, predict, report, teachers, train
from amtss_fast.errors import UserError

_COMMANDS = {
    "demo": demo,
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

    An error that the user can mend is printed as one line and gives the status 2, as a mistyped argument does. Any
    other error is raised.
    """
    chosen = _parser().parse_args(arguments)
    command = _COMMANDS[chosen.command]
    parser = argparse.ArgumentParser(
        prog=f"amtss-fast {chosen.command}",
        description=f"{command.SUMMARY[0].upper()}{command.SUMMARY[1:]}.\n\n{command.DETAILS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    # Overrides may stand before and after options.
    options = parser.parse_intermixed_args(chosen.arguments)
    try:
        command.run(options)
    except (UserError, FileNotFoundError, FileExistsError, ImportError) as error:
        if chosen.trace:
            raise
        print(f"amtss-fast {chosen.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, _COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {command.SUMMARY}" for name, command in _COMMANDS.items())
    parser = argparse.ArgumentParser(
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
