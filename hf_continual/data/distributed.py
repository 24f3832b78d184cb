"""Calls that all processes of a run make together: one makes a value and all get it, or all raise the same error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def world() -> tuple[int, int]:
    """Number of processes, and the rank of this one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0


def gathered(mine: Any) -> list[Any]:
    """One value of every process, in their order."""
    size, _ = world()
    if size == 1:
        return [mine]
    everyone: list[Any] = [None] * size
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def from_first(make: Callable[[], Any]) -> Any:
    """What process 0 makes; if it raises, every process raises: otherwise the others would wait forever."""
    size, rank = world()
    if size == 1:
        return make()
    box: list[Any] = [None, None]
    if rank == 0:
        try:
            box[0] = make()
        except Exception as error:
            box[1] = error
    torch.distributed.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def all_well(problem: Exception | None) -> None:
    """Raise the first problem of any process in all of them."""
    for found in gathered(problem):
        if found is not None:
            raise found
