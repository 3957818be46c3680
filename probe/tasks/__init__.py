"""What models are asked to do. To add a task: write it in a file of its family and merge that file's TASKS here."""

from probe.tasks import arithmetic, files, lego, passkey, pcfg, scan, sorting, strings
from probe.tasks.base import Example, GeneratedTask, PromptedTask, Splits, Task, Vocabulary, make_task
from probe.tasks.scratchpad import Check, Step, SteppedTask
from probe.tasks.tokenizers import TextVocabulary, read_tokenizer

#: Every task by its name.
TASKS: dict[str, type[Task]] = {
    **strings.TASKS,
    **arithmetic.TASKS,
    **sorting.TASKS,
    **lego.TASKS,
    **scan.TASKS,
    **pcfg.TASKS,
    **files.TASKS,
    **passkey.TASKS,
}

__all__ = [
    "TASKS",
    "Check",
    "Example",
    "GeneratedTask",
    "PromptedTask",
    "Splits",
    "Step",
    "SteppedTask",
    "Task",
    "TextVocabulary",
    "Vocabulary",
    "make_task",
    "passkey",
    "pcfg",
    "read_tokenizer",
    "scan",
]
