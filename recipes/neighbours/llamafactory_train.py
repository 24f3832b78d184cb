"""`llamafactory-cli train config.yaml` with methods against forgetting, described below `continual` in the same file.

    python llamafactory_train.py config.yaml

    continual:
      methods: [{freeze: {bottom: 2}}, {recadam: {pull: 0.01, anneal: none}}]
      task_name: law

The other keys are LLaMA-Factory's. The methods go to `run_exp` as a callback, which is all that it takes.
"""

import sys
from pathlib import Path

import yaml
from llamafactory.train.tuner import run_exp

from hf_continual import ContinualCallback


def main(file: str) -> None:
    """Train as a configuration file says."""
    config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    settings = config.pop("continual", None)
    if not isinstance(settings, dict) or "methods" not in settings:
        sys.exit(
            f"{file} has no methods: write them below continual, such as continual: {{methods: {{freeze: {{bottom: 2}}}}}}."
        )
    run_exp(config, callbacks=[ContinualCallback(**settings)])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python llamafactory_train.py config.yaml")
    main(sys.argv[1])
