"""Options that several commands have."""

from __future__ import annotations

import argparse
from typing import get_args

from tolaria.governor.config import Preset


def add_preset(parser: argparse._ActionsContainer) -> None:
    """``--preset NAME``, and ``--strict`` in short; None if neither is given."""
    parser.add_argument(
        "--preset",
        choices=get_args(Preset),
        help="the governor's settings (default: default)",
    )
    parser.add_argument(
        "--strict", action="store_const", const="strict", dest="preset", help="the same as --preset strict"
    )
