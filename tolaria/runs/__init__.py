"""Whole runs: train a task, keep everything it said in a folder, draw it, load the model again."""

from tolaria.runs.folder import RunFolder
from tolaria.runs.plot import plot_run
from tolaria.runs.record import read_lines
from tolaria.runs.resume import resume_task
from tolaria.runs.run import cpu_threads, default_folder, run_task
from tolaria.runs.storage import load_model, save_model

__all__ = [
    "RunFolder",
    "cpu_threads",
    "default_folder",
    "load_model",
    "plot_run",
    "read_lines",
    "resume_task",
    "run_task",
    "save_model",
]
