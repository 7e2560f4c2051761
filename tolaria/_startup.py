"""Ctrl-C while the ``tolaria`` command starts or ends: no tracebacks out of half-loaded modules.

Imported before everything else, since torch takes seconds to load.
"""

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


def raise_again() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt again, where :data:`changed` says that it is not."""
    if changed:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_command() -> bool:
    """Whether this process is ``tolaria`` or ``python -m tolaria``: the argument is still ``-m`` then."""
    name = sys.argv[0] if getattr(sys, "argv", None) else ""
    return name == "-m" or PurePath(name).stem == "tolaria"


changed = _is_command() and die_quietly()
"""Whether Ctrl-C is silent while the package is imported."""
