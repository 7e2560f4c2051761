"""The ``tolaria`` command: find the sub-command, import its module, run it.

A sub-command is a module with two functions, ``add_arguments(parser)`` and ``run(arguments) -> int``, and a
line in :data:`COMMANDS`. Only the module of the command typed is imported, so that ``tolaria doctor``
works without what ``tolaria train`` needs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import tolaria
from tolaria import _startup
from tolaria.errors import ConfigError, TolariaError

COMMANDS: dict[str, tuple[str, str]] = {
    "train": (
        "tolaria.cli.train",
        "grow a network on a task, under the governor's eye, and leave a run folder",
    ),
    "chaos": (
        "tolaria.cli.chaos",
        "break training runs in every way there is, and print what the governor made of it",
    ),
    "report": (
        "tolaria.cli.report",
        "write one HTML page about a run, or about several beside each other",
    ),
    "watch": (
        "tolaria.cli.watch",
        "serve the page of a run that is still going, on this machine alone",
    ),
    "build": (
        "tolaria.cli.build",
        "compile the fused ops for the torch that is installed, into a cache",
    ),
    "doctor": (
        "tolaria.cli.doctor",
        "report versions, build, backends, devices, and what to do",
    ),
}
"""Each sub-command: its module and one line of help."""

INTERRUPTED, BROKEN_PIPE = 130, 141
"""Exit status after Ctrl-C, and after the reader of our output has left, as shells have them."""


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser of the whole command; only ``command`` gets its arguments, the others their line of help."""
    parser = argparse.ArgumentParser(
        prog="tolaria", description="Grow networks while they train, and keep the run alive."
    )
    parser.add_argument("--version", action="version", version=f"tolaria {tolaria.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, (module_name, summary) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == command:
            module = importlib.import_module(module_name)
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the ``tolaria`` command.

    Args:
        arguments: what follows the program's name; default ``sys.argv[1:]``.

    Returns:
        The exit status: 0 for success, 1 for a failure explained on stderr, 130 after Ctrl-C, 141 if nobody
        reads the output any more. A command line that does not parse ends in ``SystemExit(2)``.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    _startup.open_streams()
    command = next((word for word in words if not word.startswith("-")), None)
    try:
        return _run(command, words)
    except (TolariaError, ConfigError) as error:
        print(f"tolaria {command}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read our output has left; python would complain once more at its exit
        _give_up_stdout()
        return BROKEN_PIPE
    except OSError as error:
        print(f"tolaria {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"tolaria {command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(command: str | None, words: Sequence[str]) -> int:
    parser = build_parser(command)
    parsed = parser.parse_args(words)
    if parsed.command is None:
        parser.print_help()
        return 0
    run: Callable[[argparse.Namespace], int] = parsed.run
    return run(parsed)


def shell_command() -> NoReturn:
    """The ``tolaria`` of a shell: :func:`main`, and an exit during which Ctrl-C prints nothing."""
    try:
        try:
            status: int | str | None = main()
        except SystemExit as ended:
            status = ended.code
        status = _flushed(status)
    finally:
        _startup.die_quietly()
    sys.exit(status)


def _flushed(status: int | str | None) -> int | str | None:
    """``status``, or another if our output could not be written; python would say so with a traceback."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _give_up_stdout()
        if isinstance(error, BrokenPipeError):
            return BROKEN_PIPE
        print(f"tolaria: {error}", file=sys.stderr)
        return 1
    return status


def _give_up_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
