"""The plot of a merge's weights, drawn in a separate process.

matplotlib takes about 30 MB, several times what a merge takes; so the merge itself does not import it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# The same search path as here, whatever the working directory.
_CODE = (
    "import json, sys\n"
    "data = json.load(sys.stdin)\n"
    "sys.path[:] = data['path']\n"
    "from hf_continual.merging.methods.recall.heat_map import draw\n"
    "draw(data)\n"
)


def save_heat_map(weights: Mapping[str, Sequence[float]], models: Sequence[str], file: Path) -> None:
    """Plot how much of each layer comes from which model.

    Args:
        weights: Layer group -> one weight per model.
        models: Names of the models.
        file: The PNG to write.

    Raises:
        RuntimeError: If drawing fails.
    """
    data = {
        "path": sys.path,
        "weights": {g: list(w) for g, w in weights.items()},
        "models": list(models),
        "file": str(file),
    }
    done = subprocess.run([sys.executable, "-c", _CODE], input=json.dumps(data), text=True, capture_output=True)
    if done.returncode != 0:
        raise RuntimeError(f"{file.name} could not be drawn: {done.stderr.strip()[-500:]}")


def draw(data: Mapping[str, Any]) -> None:
    """Draw the plot; runs in the other process.

    Args:
        data: What `save_heat_map` sends.
    """
    import numpy as np

    from hf_continual.plots import plot_layer_weights

    weights = np.array(list(data["weights"].values())).T
    plot_layer_weights(weights, list(data["weights"]), data["models"]).savefig(data["file"], dpi=120)
