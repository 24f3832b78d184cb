"""A plugin for axolotl: methods against forgetting as keys of its YAML, on whatever trainer axolotl builds.

    plugins:
      - hf_continual.neighbours.axolotl.ContinualPlugin
    continual:
      methods: [{freeze: {bottom: 2}}, {recadam: {pull: 0.01, anneal: none}}]
      task_name: law

axolotl is imported when its plugin is asked for, and not copied: its plugin class is under its own licence.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from hf_continual.data.kept import weight_files
from hf_continual.trainer.callback import ContinualCallback

__all__ = ["ContinualArgs", "ContinualPlugin", "ContinualSettings"]  # noqa: F822 # pyrefly: ignore[bad-dunder-all] - by __getattr__
KEY = "continual"


class ContinualSettings(BaseModel):
    """The keys below ``continual``: those of `ContinualCallback`, methods as in a plan.

    Args:
        methods: A name, a mapping of names to hyper-parameters, or a list of these.
        task_name: Name of the task.
        task_index: Place of the task in its sequence, counted from 0.
        predecessor: Folder or Hub id of the previous task, if `base_model` does not tell: for an adapter.
        fresh_methods: Start without what the methods of the previous task left.
    """

    model_config = ConfigDict(extra="forbid")

    methods: str | dict[str, Any] | list[str | dict[str, Any]]
    task_name: str = "task"
    task_index: int = 0
    predecessor: str | None = None
    fresh_methods: bool = False

    @model_validator(mode="after")
    def _can_be_built(self) -> ContinualSettings:
        # A wrong name or type must fail here, before any weights are loaded.
        try:
            callback_of(self.model_dump())
        except TypeError as error:  # which pydantic would not put into its report
            raise ValueError(str(error)) from error
        return self


class ContinualArgs(BaseModel):
    """What the plugin adds to axolotl's configuration."""

    continual: ContinualSettings


def callback_of(settings: Mapping[str, Any]) -> ContinualCallback:
    """The callback that the keys below ``continual`` describe.

    Args:
        settings: See `ContinualSettings`.

    Returns:
        The callback, of no trainer yet.
    """
    return ContinualCallback(**settings)


class Seat:
    """What the plugin does in a run; axolotl's plugin class is put below when it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.callback: ContinualCallback | None = None
        self.began = 0.0

    def get_input_args(self) -> str:
        """Where axolotl finds the keys that the plugin adds."""
        return f"{__name__}.ContinualArgs"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Give the trainer its methods: nothing is wrapped, and no optimizer is built."""
        settings: Any = cfg[KEY]
        plain = settings.to_dict() if hasattr(settings, "to_dict") else dict(settings)
        self.began, self.callback = time.time(), callback_of(plain)
        self.callback.attach(trainer)

    def post_train(self, cfg: Any, model: Any) -> None:
        """Leave what methods learned with the model, which axolotl saves without its trainer.

        axolotl calls it when training has ended, and again when the model is saved: only then are there weights that this run
        wrote.
        """
        folder = Path(cfg["output_dir"])
        saved = [file.stat().st_mtime for file in weight_files(folder)]
        if self.callback is not None and saved and min(saved) >= self.began:
            self.callback.leave_in(folder)


def __getattr__(name: str) -> Any:
    if name != "ContinualPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    try:
        from axolotl.integrations.base import BasePlugin  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise ImportError(
            f"ContinualPlugin is a plugin of axolotl, which cannot be imported here ({error}): pip install axolotl. Without axolotl, "
            f"ContinualCallback puts methods on any trainer of transformers."
        ) from error
    made = type(name, (Seat, BasePlugin), {"__module__": __name__, "__doc__": "The plugin; see the module."})
    globals()[name] = made
    return made
