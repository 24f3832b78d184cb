"""What this machine has, and which versions are not those that the project asks for; `--model` converts the model.

Exit code 1 if a package that the project imports is missing: nothing would run.
"""

from __future__ import annotations

import re
import sys
import time
import tomllib
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parents[3]
NEEDED = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "pydantic",
    "rouge_score",
    "typer",
    "pytest",
)


def required() -> list[str]:
    """The project's requirements, and what the tests and the model's conversion need."""
    read = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {"pytest", "pytest-timeout", "gguf"}
    more = [r for r in read["optional-dependencies"]["dev"] if Requirement(r).name in wanted]
    return [*read["dependencies"], *more]


def off(requirements: list[str], by: str, seen: set[str]) -> Iterator[str]:
    """Sentences about requirements that are not met, and those of what is installed."""
    for text in requirements:
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        name = re.sub(r"[-_.]+", "-", need.name).lower()
        try:
            found = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            yield f"{name} is missing; {by} asks for {need.specifier or 'any version'}"
            continue
        if not need.specifier.contains(found, prereleases=True):
            yield f"{name} is {found}; {by} asks for {need.specifier}"
        if name not in seen and not name.startswith(
            ("torch", "nvidia")
        ):  # a wheel of torch names its CUDA libraries exactly
            seen.add(name)
            yield from off(metadata.requires(need.name) or [], f"{name} {found}", seen)


def convert() -> int:
    """Convert the model from the wheel; without the wheel, that is stated."""
    import torch

    from hf_continual.demo.model import embedded_model

    begun = time.monotonic()
    try:
        print(f"{embedded_model(torch.bfloat16)}, {time.monotonic() - begun:.0f} s")
    except FileNotFoundError as error:
        print(error)
        return 1
    return 0


def main() -> int:
    """Write ``machine.json`` and print it."""
    if "--model" in sys.argv:
        return convert()
    print(f"Python {sys.version.split()[0]}")
    missing = [name for name in NEEDED if util.find_spec(name) is None]
    wrong = list(dict.fromkeys(off(required(), "the project", set())))
    for line in wrong:
        print(f"off: {line}")
    if missing:
        print(f"cannot be imported: {', '.join(missing)}")
        return 1
    from results import Results, about, device

    facts = about()
    results = Results("machine")
    results.add("off", wrong)
    if device() == "cpu":
        print("off: torch sees no GPU")
    print(f"{facts['card'] or 'CPU'}, torch {facts['versions']['torch']}, CUDA {facts['cuda']}, {facts['cores']} cores")
    return 0


if __name__ == "__main__":
    sys.exit(main())
