"""The chaos kit: break real training runs on purpose and see what the governor makes of it."""

from tolaria.chaos.faults import (
    BadLoss,
    ChaosFault,
    Collapse,
    InterruptedCapture,
    LargeBuffer,
    PoisonedCapture,
    PoisonedTensor,
    RaisingSink,
    Ramp,
    Spike,
    StructureChange,
    chosen_faults,
    list_chaos_faults,
    random_faults,
)
from tolaria.chaos.run import Outcome, execute, task_run
from tolaria.chaos.table import ChaosTable, run_table
from tolaria.chaos.target import ChaosRun

__all__ = [
    "BadLoss",
    "ChaosFault",
    "ChaosRun",
    "ChaosTable",
    "Collapse",
    "InterruptedCapture",
    "LargeBuffer",
    "Outcome",
    "PoisonedCapture",
    "PoisonedTensor",
    "RaisingSink",
    "Ramp",
    "Spike",
    "StructureChange",
    "chosen_faults",
    "execute",
    "list_chaos_faults",
    "random_faults",
    "run_table",
    "task_run",
]
