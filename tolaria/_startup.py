"""Ctrl-C while the ``tolaria`` command starts or ends: no tracebacks out of half-loaded modules.

Imported before everything else, since torch takes seconds to load.
"""

import os
import signal
import sys
import threading
from pathlib import PurePath


def die_quietly() -> bool:
    """From here on Ctrl-C ends the process without a word, unless somebody handles it already.

    Returns:
        Whether anything was changed; :func:`raise_again` undoes it.
    """
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return ours


def open_streams() -> None:
    """Let standard streams that the caller closed (``>&-``) lead nowhere.

    Otherwise the next file that is opened would get their number, and what others print would land in it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
        if getattr(sys, name, None) is None:
            setattr(sys, name, open(os.devnull, "r" if number == 0 else "w"))  # noqa: SIM115


def raise_again() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt again, where :data:`changed` says that it is not."""
    if changed:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_command() -> bool:
    """Whether this process is ``tolaria`` or ``python -m tolaria``: the argument is still ``-m`` then."""
    name = sys.argv[0] if getattr(sys, "argv", None) else ""
    return name == "-m" or PurePath(name).stem == "tolaria"


if _is_command():
    open_streams()
changed = _is_command() and die_quietly()
"""Whether Ctrl-C is silent while the package is imported."""
