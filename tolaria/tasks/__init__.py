"""Tasks: what is learned, from which data, by which host."""

from tolaria.tasks.data import Batches, TaskData, TensorBatches, WindowBatches
from tolaria.tasks.spec import (
    TaskSpec,
    TaskType,
    TrainSettings,
    create_model,
    get_task,
    list_tasks,
    register_task,
)

__all__ = [
    "Batches",
    "TaskData",
    "TaskSpec",
    "TaskType",
    "TensorBatches",
    "TrainSettings",
    "WindowBatches",
    "create_model",
    "get_task",
    "list_tasks",
    "register_task",
]
