"""The licence of a model from the licences of its parents: copied if they agree, requested from the user if they differ.

Never a default: a wrong licence harms the parents' authors. This is not legal advice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import resources

from hf_continual.hub.facts import CardFacts
from hf_continual.hub.refs import ModelRef


class LicenseConflict(ValueError):
    """The parents' licences differ, so the user must decide."""


def hub_licenses() -> frozenset[str]:
    """The licence ids that the Hub accepts."""
    text = resources.files("hf_continual.hub").joinpath("licences.txt").read_text(encoding="utf-8")
    return frozenset(text.split())


@dataclass(frozen=True)
class License:
    """A licence as a card states it.

    Args:
        id: An id of `hub_licenses`.
        name: Name, if the id is ``other``.
        link: Address or file, if the id is ``other``.
    """

    id: str
    name: str | None = None
    link: str | None = None


def inherit(parents: Mapping[str, License | None], asked: str | None = None) -> tuple[License | None, str]:
    """Derive the licence from those of the parents.

    Args:
        parents: Licence of each parent by name; None is unknown.
        asked: The user's choice; takes precedence.

    Returns:
        The licence or None, and where it comes from in words.

    Raises:
        LicenseConflict: If the parents' licences differ and the user chose none.
        ValueError: If `asked` is not a licence id of the Hub.
    """
    if asked is not None:
        if asked not in hub_licenses():
            raise ValueError(
                f"license={asked!r} is not a licence id of the Hub. Use one from its list, such as 'apache-2.0', "
                f"'mit', 'cc-by-4.0', 'llama3.2' or 'other' (with license_name and license_link in the card)."
            )
        same = next((known for known in parents.values() if known is not None and known.id == asked), None)
        return same or License(asked), "chosen by the author"
    known = {name: found for name, found in parents.items() if found is not None}
    different = sorted({found.name or found.id for found in known.values()})
    if len(different) > 1:
        listed = ", ".join(f"{name}: {found.name or found.id}" for name, found in known.items())
        raise LicenseConflict(
            f"the parents have different licences ({listed}), and which one applies to the result cannot be determined automatically. "
            f"Read them and choose: license='...'."
        )
    unknown = [name for name in parents if name not in known]
    if unknown or not known:
        return None, f"unknown, because the licence of {', '.join(unknown) or 'its parents'} is not stated"
    return next(iter(known.values())), f"the licence of {' and '.join(known)}"


def with_license(facts: CardFacts, asked: str | None = None, known: Mapping[str, License] | None = None) -> CardFacts:
    """Add the licence that follows from the parents' to the facts.

    Args:
        facts: The facts.
        asked: The user's choice.
        known: Licences by Hub id, as the Hub states them.

    Returns:
        The facts, completed.

    Raises:
        LicenseConflict: If the parents' licences differ and the user chose none.
    """
    parents = unique(
        (_called(p), (known or {}).get(p.hub_id or "") or (License(p.license) if p.license else None))
        for p in dict.fromkeys(facts.parents)
    )
    if asked is None and facts.license_reason == "chosen by the author":
        return facts
    found, reason = inherit(parents, asked)
    if found is None:
        return replace(facts, license=None, license_name=None, license_link=None, license_reason=reason)
    return replace(facts, license=found.id, license_name=found.name, license_link=found.link, license_reason=reason)


def unique(parents: Iterable[tuple[str, License | None]]) -> dict[str, License | None]:
    """Licences by name, where several local models may share a name."""
    found: dict[str, License | None] = {}
    for name, stated in parents:
        key, number = name, 1
        while key in found and found[key] != stated:
            number += 1
            key = f"{name} ({number})"
        found[key] = stated
    return found


def _called(parent: ModelRef) -> str:
    return parent.hub_id or parent.name or "the base model"
