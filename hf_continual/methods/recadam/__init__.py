"""RecAdam (EMNLP 2020): `method` is the class, `optimizer` the optimizer, `schedule` the mathematics of one step."""

from hf_continual.methods.recadam.method import RecAdam
from hf_continual.methods.recadam.optimizer import RecAdamOptimizer
from hf_continual.methods.recadam.schedule import recall_schedule, recall_share

__all__ = ["RecAdam", "RecAdamOptimizer", "recall_schedule", "recall_share"]
