"""GLUE, SuperGLUE and reviews as data, for language models and classification heads alike."""

from . import glue, reviews, super_glue  # noqa: F401  (each registers its tasks)
from .base import HIDDEN, Task, available_tasks, get_task, register_tasks


__all__ = ["HIDDEN", "Task", "available_tasks", "get_task", "register_tasks"]
