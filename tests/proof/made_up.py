"""Result files with invented numbers, small enough to compute by hand."""

from __future__ import annotations

from typing import Any

TASKS = ["a", "b"]


def result(
    arm: str,
    seed: int = 0,
    old: Any = 2.0,
    right_after: float = 1.0,
    general: Any = 4.0,
    learned: Any = 1.0,
    kept: Any = 0.0,
    **changes: Any,
) -> dict[str, Any]:
    """Two tasks of four rows: the loss and score of the first after the second are `old` and `kept`.

    `learned` is the score of each task right after it; `general` the loss of four documents with 1, 1, 1 and 5 tokens.
    """

    def four(value: Any) -> list[float]:
        return list(value) if isinstance(value, list) else [value] * 4

    def cell(score: Any, nll: Any) -> dict[str, list[float]]:
        return {"score": four(score), "nll": four(nll)}

    text = {"score": four(3.0), "weight": [1, 1, 1, 5]}
    rows = {
        "-1": {"a": cell(0.0, 6.0), "b": cell(0.0, 6.0), "general": text},
        "0": {"a": cell(learned, right_after)},
        "1": {"a": cell(kept, old), "b": cell(learned, right_after), "general": {**text, "score": four(general)}},
    }
    made = {
        "format": 1, "preset": "cpu", "use": "claim", "data": "longseq", "arm": arm, "seed": seed, "run": f"claim-longseq/{arm}-seed{seed}",
        "model": "model", "joint": False, "kl_is_of_base": True, "tasks": TASKS, "rows": rows, "probes": {}, "versions": {}, "cpu_seconds": 5.0,
        "cost": {"seconds": 3.0, "tokens": 1000, "steps": 2, "model_bytes": 10, "state_bytes": 0, "hardware": "a machine", "peak_memory_bytes": None},
    }  # fmt: skip
    from recipes.proof.check import cells_from_rows, figures

    computed = figures(cells_from_rows(made), TASKS)
    computed["figures"]["kl"] = 0.5
    return {**made, **computed, **changes}


def seeds(arm: str, **values: Any) -> list[dict[str, Any]]:
    """Three seeds; a tuple holds a value for each."""
    return [
        result(arm, seed, **{k: v[seed] if isinstance(v, tuple) else v for k, v in values.items()}) for seed in range(3)
    ]
