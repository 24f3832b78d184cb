"""This library's version, and the versions of its dependencies that were checked."""

from __future__ import annotations

from importlib import metadata

from packaging.specifiers import SpecifierSet

VERSION = "0.1.0"

# The trainer overrides private members of TRL and transformers, so these ranges are narrow on purpose.
SUPPORTED = {"trl": ">=1.16,<2", "transformers": ">=5.23,<6", "peft": ">=0.21"}


def check_versions() -> None:
    """Refuse versions that were not checked, before any of them is imported.

    Raises:
        ImportError: If a library is missing or outside its range; names the command that fixes it.
    """
    for name, wanted in SUPPORTED.items():
        command = f"pip install '{name}{wanted}'"
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            raise ImportError(f"hf_continual needs {name}{wanted}, and {name} is not installed: {command}") from None
        if not SpecifierSet(wanted).contains(found, prereleases=True):
            raise ImportError(
                f"hf_continual supports {name}{wanted}, and {name} {found} is installed. It builds on private members "
                f"of {name} that other versions may have changed: {command}"
            )
