"""This library's version, and the versions of its dependencies that were checked."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

from packaging.specifiers import SpecifierSet

VERSION = "0.1.0"

# Methods on any trainer of transformers (ContinualCallback, ContinualMixin): tests/neighbours passes with transformers 5.6.0 and
# peft 0.18.1 (the newest that LLaMA-Factory 0.9.5 allows), with 5.16.1 and 0.20.0 (axolotl 0.19.0), and with 5.23.0 and 0.21.2.
# Merging and publishing were tested with transformers 5.23 and later only.
SUPPORTED = {"transformers": ">=5.6,<6", "peft": ">=0.18.1"}
# ContinualTrainer and all that is built on it overrides private members of TRL, so these ranges are narrow on purpose.
SUPPORTED_WITH_TRL = {"trl": ">=1.16,<2", "transformers": ">=5.23,<6", "peft": ">=0.21"}


def check_versions(supported: Mapping[str, str] = SUPPORTED, who: str = "hf_continual") -> None:
    """Refuse versions that were not checked, before any of them is imported.

    Args:
        supported: Ranges by library.
        who: What needs them, for the message.

    Raises:
        ImportError: If a library is missing or outside its range; names the command that fixes it.
    """
    for name, wanted in supported.items():
        command = f"pip install '{name}{wanted}'"
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            raise ImportError(f"{who} needs {name}{wanted}, and {name} is not installed: {command}") from None
        if not SpecifierSet(wanted).contains(found, prereleases=True):
            raise ImportError(
                f"{who} supports {name}{wanted}, and {name} {found} is installed. It builds on private members "
                f"of {name} that other versions may have changed: {command}"
            )


def check_trl() -> None:
    """Refuse a TRL that was not checked, and the versions of other libraries that go with it.

    Raises:
        ImportError: If a library is missing or outside its range; names the command, and what works without.
    """
    try:
        check_versions(SUPPORTED_WITH_TRL, "ContinualTrainer, with all that uses TRL,")
    except ImportError as error:
        raise ImportError(
            f"{error}. In an environment that must keep its versions, ContinualCallback puts methods on any trainer of "
            f"transformers without TRL."
        ) from None
