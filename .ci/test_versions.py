"""`make test-versions`: the lowest and the newest versions that pyproject.toml allows, installed with uv and tested.

For each Python and each end of the ranges a virtual environment is made outside the checkout; it is kept, and used again by the
next run with the same requirements. torch comes from the index of its CPU wheels (UV_TORCH_BACKEND=cpu), or, without a network, from a
folder of them that UV_FIND_LINKS names; where there is no wheel for a Python, that Python is reported as not run.

    python .ci/test_versions.py [--python 3.11 3.12 3.13] [--ends lowest highest without-trl]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = (
    "tests/trainer/test_seams.py", "tests/trainer/test_behaviour.py", "tests/trainer/test_identity.py", "tests/first_hour",
    "tests/stream/test_plan.py",
)  # fmt: skip
# Where TRL is missing, which the library does not need for methods on other trainers.
WITHOUT_TRL = ("tests/neighbours/test_plain_trainer.py",)
TOOLS = ("pytest>=8.3", "pytest-timeout>=2.3", "pytest-xdist>=3.6")
ENDS = {"lowest": "lowest-direct", "highest": "highest", "without-trl": "lowest-direct"}


def main() -> None:
    """Install and test every cell, print what became of each, exit with 1 if one failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", nargs="+", default=["3.11", "3.12", "3.13"])
    parser.add_argument("--ends", nargs="+", choices=ENDS, default=list(ENDS))
    asked = parser.parse_args()
    results = {f"Python {p}, {end}": run(p, end) for p in asked.python for end in asked.ends}
    for cell, said in results.items():
        sys.stdout.write(f"{cell}: {said}\n")
    sys.exit(
        any(said.startswith("FAILED") for said in results.values()) or not any("passed" in s for s in results.values())
    )


def run(python: str, end: str) -> str:
    """Install one cell and test it; what became of it, in a line."""
    folder = environment(python, end)
    if not (folder / "installed").is_file():
        said = install(python, end, folder)
        if said is not None:
            return said
    versions = ", ".join(installed(folder / "bin" / "python"))
    command = [
        str(folder / "bin" / "python"),
        "-m",
        "pytest",
        "-q",
        "-n",
        "2",
        "-m",
        "not gpu and not network and not slow and not exhaustive",
    ]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    # Other versions warn of other things; what fails is tested here, not what warns.
    tests = WITHOUT_TRL if end == "without-trl" else TESTS
    done = subprocess.run([*command, "-W", "default", *tests], cwd=ROOT, env=variables, check=False)
    return f"{'passed' if done.returncode == 0 else 'FAILED'} with {versions}"


def environment(python: str, end: str) -> Path:
    """Where a cell is installed; another set of requirements is another folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "hf_continual" / "versions"
    digest = hashlib.sha256("\n".join(requirements(end)).encode()).hexdigest()[:10]
    return cache / f"{python}-{end}-{digest}"


def requirements(end: str = "lowest") -> list[str]:
    """The library's dependencies and what tests them; where TRL is tested, in the versions that it is used with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if end == "without-trl":
        return [*(d for d in project["dependencies"] if not d.startswith("trl")), *TOOLS]
    versions = runpy.run_path(str(ROOT / "hf_continual" / "versions.py"))
    return [*project["dependencies"], *(f"{n}{v}" for n, v in versions["SUPPORTED_WITH_TRL"].items()), *TOOLS]


def install(python: str, end: str, folder: Path) -> str | None:
    """Make the environment; what stopped it, or None."""
    uv = [sys.executable, "-m", "uv"]
    variables, torch = dict(os.environ), []
    if "UV_FIND_LINKS" not in variables:
        variables["UV_TORCH_BACKEND"] = "cpu"
    elif not (torch := on_the_disk(python, end)):
        return f"not run: {variables['UV_FIND_LINKS']} has no CPU wheel of torch for Python {python}"
    made = subprocess.run([*uv, "venv", "--quiet", "--clear", "--python", python, str(folder)], capture_output=True, text=True, env=variables, check=False)  # fmt: skip
    if made.returncode:
        return f"not run: there is no Python {python} ({made.stderr.strip().splitlines()[-1]})"
    command = [*uv, "pip", "install", "--quiet", "--python", str(folder / "bin" / "python"), "--resolution", ENDS[end]]
    done = subprocess.run(
        [*command, *requirements(end), *torch], capture_output=True, text=True, env=variables, check=False
    )
    if done.returncode == 0:
        subprocess.run([*command, "--no-deps", "--editable", str(ROOT)], env=variables, check=True)
        (folder / "installed").touch()
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    kind = "not run: torch has no CPU wheel that can be installed" if "torch" in done.stderr else "FAILED to install"
    return f"{kind} ({' '.join(lines)[:300]})"


def on_the_disk(python: str, end: str) -> list[str]:
    """The lowest or the newest CPU wheel of torch in the folder of UV_FIND_LINKS, as a requirement; empty where there is none."""
    tag = f"cp{python.replace('.', '')}"
    wheels = Path(os.environ["UV_FIND_LINKS"]).glob(f"torch-*+cpu-{tag}-*.whl")
    found = sorted(
        (w.name.split("-")[1] for w in wheels), key=lambda v: [int(n) for n in v.partition("+")[0].split(".")]
    )
    return [f"torch=={found[0 if end == 'lowest' else -1]}"] if found else []


def installed(python: Path) -> list[str]:
    """Versions of the libraries that decide."""
    code = "import importlib.metadata as m; print(*(n + ' ' + m.version(n) for n in ('torch', 'transformers', 'trl', 'peft', 'typer') if n in {d.name for d in m.distributions()}), sep='\\n')"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")[:-1]


if __name__ == "__main__":
    main()
