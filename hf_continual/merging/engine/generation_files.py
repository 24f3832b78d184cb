"""The output's generation configuration: where the model stops, which goes with its tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_continual.atomic_files import read_object
from hf_continual.merging.errors import as_merge_error
from hf_continual.merging.inputs.members import Member
from hf_continual.merging.inputs.tokenizer_files import eos_id, places

GENERATION_CONFIG = "generation_config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_ORIGIN = ("_from_model_config", "transformers_version", "_commit_hash")


def generation_file(
    member: Member, others: Sequence[Member], reference: Mapping[str, Any], tokenizer: Path | None
) -> tuple[Path | str | None, list[str]]:
    """Choose the generation configuration that makes the output stop where a given model stops.

    Args:
        member: The model whose chat template the output takes.
        others: If `member` has no further settings, those of the first of these that has any are taken.
        reference: The output's ``config.json``.
        tokenizer: Folder of the output's tokenizer, or None.

    Returns:
        The file; its text if no file has exactly that content; None if nothing needs to be stated; and notes.
    """
    own = _file(member)
    giver = member if own is not None else next((m for m in others if _file(m) is not None), None)
    file = None if giver is None else _file(giver)
    data = {} if file is None else _read(file)
    config = member.checkpoint.config
    said = {k: v for k in _IDS if (v := _token(config, k)) is not None}
    wanted, notes = dict(data), []
    if own is None:
        if any(v != (data.get(k) if giver else _token(reference, k)) for k, v in said.items()):
            wanted |= said
            rest = f" The rest is {giver.name}'s." if giver is not None else ""
            notes.append(
                f"{member.name} has no {GENERATION_CONFIG}; {_told(said)} of its configuration is taken.{rest}"
            )
    elif wanted.get("eos_token_id") is None and said.get("eos_token_id") not in (
        None,
        _token(reference, "eos_token_id"),
    ):
        wanted["eos_token_id"] = said["eos_token_id"]
    if tokenizer is not None:
        learned = file is None or file.parent != member.own.folder
        notes += _end_of_tokenizer(member, tokenizer, said, wanted, learned)
    if wanted == data:
        return file, notes
    # It would make transformers read config.json, which has other values.
    wanted.pop("_from_model_config", None)
    return json.dumps(wanted, indent=2, sort_keys=True) + "\n", notes


def _end_of_tokenizer(
    member: Member, tokenizer: Path, said: Mapping[str, Any], wanted: dict[str, Any], learned: bool
) -> list[str]:
    """Add the eos token of a model's own tokenizer if it is newer than the configuration; note differences."""
    ends = ids(said.get("eos_token_id") if wanted.get("eos_token_id") is None else wanted["eos_token_id"])
    last, taught = (eos_id(f, tokenizer) for f in (tokenizer, member.own.folder))
    if learned and ends and taught is not None and taught not in ends:
        wanted |= {**said, **wanted, "eos_token_id": [*ends, taught]}
        return [
            f"{GENERATION_CONFIG} stops at {[*ends, taught]}: at {ends} as {member.checkpoint.name} does, and at {taught}, the "
            f"eos_token of {member.name}'s tokenizer."
        ]
    if ends and last is not None and last not in ends:
        return [f"{GENERATION_CONFIG} stops at {ends}, and the eos_token of the output's tokenizer is {last}."]
    return []


def _told(said: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v!r}" for k, v in said.items())


def ids(value: Any) -> list[int]:
    """One id or several, as a list."""
    return list(value) if isinstance(value, list) else [] if value is None else [value]


def difference(members: Sequence[Member], taken: Member) -> list[str]:
    """Describe how the generation configurations differ.

    Args:
        members: The models.
        taken: The one whose configuration the output has.

    Returns:
        A sentence, or nothing.
    """
    ends = {m.name: _stops(m) for m in members}
    if len({tuple(sorted(e)) for e in ends.values()}) > 1:
        told = ", ".join(f"{name} at {e}" for name, e in ends.items())
        return [f"The models stop at different tokens ({told}); the generation configuration is {taken.name}'s."]
    files = [{} if (f := _file(m)) is None else _read(f) for m in members]
    rest = {json.dumps({k: v for k, v in d.items() if k not in (*_IDS, *_ORIGIN)}, sort_keys=True) for d in files}
    return [f"The generation configurations differ; the output has {taken.name}'s."] if len(rest) > 1 else []


def _stops(member: Member) -> list[int]:
    file = _file(member)
    said = None if file is None else _read(file).get("eos_token_id")
    return ids(_token(member.checkpoint.config, "eos_token_id") if said is None else said)


def _token(config: Mapping[str, Any], key: str) -> Any:
    found = config.get(key)
    return (config.get("text_config") or {}).get(key) if found is None else found


def _file(member: Member) -> Path | None:
    return next((f for p in places(member) if (f := p / GENERATION_CONFIG).is_file()), None)


def _read(file: Path) -> dict[str, Any]:
    with as_merge_error():
        return read_object(file)
