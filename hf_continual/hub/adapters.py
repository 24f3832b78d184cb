"""Adapters that load elsewhere: adapter_config.json names its base by Hub id, the same one as the card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_continual.atomic_files import read_json, write_json
from hf_continual.hub.folder_facts import ADAPTER
from hf_continual.hub.refs import ModelRef, is_hub_id, model_ref
from hf_continual.inference.names import kind_in

WAYS_OUT = (
    "Two ways out: publish that model first (push_to_hub of its folder; then push this adapter again), or merge the adapter "
    "into that model (merge_and_unload, save_pretrained) and push the full model."
)
ONE_WAY_OUT = (
    "Publish that model first (push_to_hub of its folder; then push this folder again)."  # of what cannot be merged
)


def adapter_base(folder: Path) -> ModelRef:
    """The base that an adapter names, as a published or a local model."""
    config = read_json(folder / ADAPTER)
    return model_ref(config.get("base_model_name_or_path"), config.get("revision"))


def named_base(folder: Path, facts_base: ModelRef) -> ModelRef:
    """Choose the base that both the card and the adapter will name.

    Args:
        folder: The adapter's folder.
        facts_base: The base of the facts.

    Returns:
        A base with a Hub id.

    Raises:
        ValueError: If the base is not published, or the two names differ.
    """
    config = read_json(folder / ADAPTER)
    said = model_ref(config.get("base_model_name_or_path"), config.get("revision"))
    ways = WAYS_OUT if kind_in(folder) is None else ONE_WAY_OUT
    if facts_base.hub_id is None and said.hub_id is None:
        raise ValueError(
            f"it is an adapter on {said.name or 'a local model'}, which is not published: no one could load it. {ways} If "
            f"that folder is a copy of a published model, name it: ContinualConfig(hub_base_model='...'), or "
            f"push_to_hub(..., base_model='...')."
        )
    raw = config.get("base_model_name_or_path")
    if facts_base.hub_id and said.hub_id and facts_base.hub_id != said.hub_id and not Path(str(raw)).is_dir():
        raise ValueError(
            f"the card's facts name {facts_base.hub_id} as the base, but adapter_config.json names {said.hub_id}. Give the right one: "
            f"push_to_hub(..., base_model='...')."
        )
    return facts_base if facts_base.hub_id else said


def write_base(folder: Path, base: ModelRef) -> bool:
    """Write the base into adapter_config.json.

    Args:
        folder: The adapter's folder.
        base: A published base.

    Returns:
        Whether something changed.
    """
    config: dict[str, Any] = read_json(folder / ADAPTER)
    revision = base.revision or (
        config.get("revision") if config.get("base_model_name_or_path") == base.hub_id else None
    )
    if config.get("base_model_name_or_path") == base.hub_id and config.get("revision") == revision:
        return False
    assert is_hub_id(base.hub_id)
    write_json(folder / ADAPTER, {**config, "base_model_name_or_path": base.hub_id, "revision": revision})
    return True
