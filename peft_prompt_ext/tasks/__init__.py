"""GLUE, SuperGLUE and reviews as tasks, for language models and classification heads alike."""

from . import glue, reviews, super_glue  # noqa: F401  (each registers its tasks)
from .metric import Metric
from .task import HIDDEN, Task, available_tasks, get_task, register_tasks


__all__ = ["HIDDEN", "Metric", "Task", "available_tasks", "get_task", "register_tasks"]
