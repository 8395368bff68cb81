"""Tasks: how a base is loaded, what is minimised, how an answer is scored; one file each, one line in this table."""

from manylora.evaluation.sample import Metrics, Sample
from manylora.table import Table
from manylora.tasks.task import Task

TASKS: Table[Task] = Table("task", {"sft": "manylora.tasks.sft:SFT", "module": "manylora.tasks.module:MODULE"})

__all__ = ["TASKS", "Metrics", "Sample", "Task"]
