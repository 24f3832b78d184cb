"""Find the model in a folder: a model, an adapter, or the last task of a plan's run."""

from __future__ import annotations

from pathlib import Path

from hf_continual.paths import check_is_there
from hf_continual.stream.plan import ModelPlan
from hf_continual.stream.plan_lines import PlanError

WEIGHTS = ("config.json", "adapter_config.json")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def model_of(folder: str, base: str | None = None, dtype: str = "auto") -> ModelPlan:
    """Find the model that a user means by a folder or a Hub id.

    Args:
        folder: Folder or Hub id of a model or adapter, or the folder of a plan's run, meaning its last finished task.
        base: The adapter's base, instead of the recorded one.
        dtype: dtype of the weights.

    Returns:
        The model to load.

    Raises:
        FileNotFoundError: If it can only be a path, and does not exist.
        PlanError: If the folder holds no model, or the dtype is unknown.
    """
    if dtype not in DTYPES:
        raise PlanError(f"--dtype {dtype}: must be one of {', '.join(DTYPES)}.")
    check_is_there(folder, "the model")
    path = Path(folder).expanduser()
    if path.is_dir() and not any((path / name).is_file() for name in WEIGHTS):
        tasks = sorted(p for p in path.glob("task-*") if not p.name.endswith(".partial"))
        if not tasks:
            begun = (
                " It contains an unfinished task: run the plan again to finish it." if any(path.glob("task-*")) else ""
            )
            raise PlanError(
                f"{folder} holds no model (neither {' nor '.join(WEIGHTS)}) and no finished task of a plan.{begun or ' Give the folder of a saved model.'}"
            )
        path = tasks[-1]
    named = str(path) if path.is_dir() else folder
    if base is not None:
        check_is_there(base, "--base")
        return ModelPlan(path=base, adapter=named, dtype=dtype)  # pyrefly: ignore[bad-argument-type]
    return ModelPlan(path=named, dtype=dtype)  # pyrefly: ignore[bad-argument-type]
