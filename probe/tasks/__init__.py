"""What models are asked to do. To add a task: write it in a file of its family and merge that file's TASKS here."""

from probe.tasks import scan, strings
from probe.tasks.base import Example, Splits, Task, Vocabulary, make_task

TASKS: dict[str, type[Task]] = {**strings.TASKS, **scan.TASKS}

__all__ = ["TASKS", "Example", "Splits", "Task", "Vocabulary", "make_task", "scan"]
