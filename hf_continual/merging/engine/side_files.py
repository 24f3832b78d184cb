"""The files next to the weights, chosen together: tokenizer, chat template, generation configuration, processor.

The models are searched in an order: the newest first, then the others from the last to the first; for an adapter, its own
folder before its base's. Tokenizer, chat template, generation configuration and processor are those of the first model in
this order that has a complete tokenizer whose tokens have rows in the output, and a chat template if any model has one. With
``vocab="extend"`` the longest tokenizer comes first. What that model lacks comes from the next one; the generation
configuration goes with the template. All are copied byte for byte, except a file whose content must change.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_continual.atomic_files import read_object, write_text
from hf_continual.merging.engine.generation_files import GENERATION_CONFIG, difference, generation_file
from hf_continual.merging.errors import as_merge_error, some
from hf_continual.merging.inputs.checkpoint import ADAPTER_CONFIG, CONFIG, Checkpoint
from hf_continual.merging.inputs.members import Member
from hf_continual.merging.inputs.tokenizer_files import (
    NONE,
    TOKENIZER_CONFIG,
    UNCONFIGURED,
    completeness,
    embedding_rows,
    extent,
    fits,
    places,
    templates,
    texts,
    tokenizer_config,
    tokenizer_files,
    tokenizer_folder,
)

_PROCESSOR = {  # file -> its parts in the newer processor_config.json
    "processor_config.json": (),
    "preprocessor_config.json": ("image_processor", "feature_extractor"),
    "video_preprocessor_config.json": ("video_processor",),
    "audio_tokenizer_config.json": ("audio_tokenizer",),
}
_NESTING, _PARTS = "processor_config.json", {part for parts in _PROCESSOR.values() for part in parts}


class SideFiles:
    """The choice for one output.

    Args:
        members: The models.
        newest: Index of the newest.
        vocab: ``"strict"`` or ``"extend"``.
    """

    def __init__(self, members: Sequence[Member], newest: int, vocab: str) -> None:
        first = members[newest]
        self.reference: Checkpoint = members[0].checkpoint
        self.order = [first, *(m for m in reversed(members) if m is not first)]
        self.rows = max((r for m in members if (r := embedding_rows(m)) is not None), default=None)
        self.folders = {id(m): tokenizer_folder(m) for m in self.order}
        self.templates = {id(m): _templates(m) for m in self.order}
        self.chosen = max(self.order, key=lambda m: self._worth(m, vocab))
        # The model whose chat template the output takes: the chosen one, unless another has the only template.
        self.speaker = next((m for m in (self.chosen, *self.order) if self.templates[id(m)][1]), self.chosen)
        self.tokenizer = self.folders[id(self.chosen)] if completeness(self.folders[id(self.chosen)]) > NONE else None
        self.names = {c.folder: c.name for m in members for c in (m.checkpoint, m.own)}
        self.notes: list[str] = []
        self.processors: list[Path] = []

    def _worth(self, member: Member, vocab: str) -> tuple[Any, ...]:
        folder = self.folders[id(member)]
        known = completeness(folder) >= UNCONFIGURED
        fitting = completeness(folder) > NONE and fits(folder, self.rows)
        count = extent(folder)[0] or embedding_rows(member) or 0
        longest = count if vocab == "extend" and known and fitting else 0
        return fitting, longest, completeness(folder), bool(self.templates[id(member)][1])

    def files(self, model: bool) -> dict[str, Path | str]:
        """Choose the files.

        Args:
            model: Whether the output is a full model.

        Returns:
            Name in the output -> source, or the text if no file has exactly that content; `notes` then states whose is taken.
        """
        found: dict[str, Path | str] = {}
        if self.tokenizer is not None:
            found |= tokenizer_files(self.tokenizer)
            if TOKENIZER_CONFIG not in found:
                found |= self._configuration()
        home, turns = self.templates[id(self.speaker)]
        for name, source in turns.items():
            # A template inside the tokenizer's own configuration comes with it.
            if isinstance(source, Path) or home != self.tokenizer:
                found[name] = source
        found |= self._processor()
        self._tell()
        if model:
            self.notes += difference(self.order, self.speaker)
            generation, notes = generation_file(self.speaker, self.order, self.reference.config, self.tokenizer)
            self.notes += notes
            if generation is not None:
                found[GENERATION_CONFIG] = generation
        return found | self._code(model)

    def _configuration(self) -> dict[str, Path]:
        """For a tokenizer without a configuration, the first one in the order."""
        for folder in self._places():
            names = (TOKENIZER_CONFIG, "special_tokens_map.json")
            if (folder / TOKENIZER_CONFIG).is_file():
                self.notes.append(
                    f"{self.chosen.name} has a tokenizer without {TOKENIZER_CONFIG}; that of {self.names[folder]} is taken."
                )
                return {n: folder / n for n in names if (folder / n).is_file()}
        return {}

    def _processor(self) -> dict[str, Path | str]:
        """The processor of the first model that has one; what it lacks comes from the next."""
        found: dict[str, Path | str] = {}
        said: set[str] = set()
        for folder in self._places():
            new = {n: folder / n for n in _PROCESSOR if n not in found and (folder / n).is_file()}
            parts = _read(new[_NESTING]).keys() & _PARTS if _NESTING in new else set()
            # A file and a part of another hold the same settings: the first one found counts.
            new = {n: p for n, p in new.items() if not (found and said & {*_PROCESSOR[n]})}
            if found and new:
                whose = f"{'is' if len(new) == 1 else 'are'} {self.names[folder]}'s"
                self.notes.append(f"{some(set(new))} {whose}; the models before it have none.")
            twice = said & parts if found else set()
            said |= parts | {part for n in new for part in _PROCESSOR[n]}
            self.processors += [folder] if new else []
            found |= new
            if twice:
                kept = {k: v for k, v in _read(new[_NESTING]).items() if k not in twice}
                found[_NESTING] = json.dumps(kept, indent=2) + "\n"
        return found

    def _places(self) -> list[Path]:
        """All folders in the order, the chosen model's first."""
        return list(dict.fromkeys(p for m in (self.chosen, *self.order) for p in places(m)))

    def _code(self, model: bool) -> dict[str, Path]:
        """Code files that a configuration's auto_map points to."""
        folders = [self.reference.folder] if model and self.reference.config.get("auto_map") else []
        if self.tokenizer is not None and tokenizer_config(self.tokenizer).get("auto_map"):
            folders.append(self.tokenizer)
        folders += [
            p for p in self.processors if any(_read(p / n).get("auto_map") for n in _PROCESSOR if (p / n).is_file())
        ]
        return {p.name: p for folder in reversed(folders) for p in sorted(folder.glob("*.py"))}

    def _tell(self) -> None:
        """Note whose files are taken, where they are not the same everywhere."""
        if len({_digest(self.folders[id(m)]) for m in self.order}) > 1 and self.tokenizer is not None:
            count = extent(self.tokenizer)[0]
            size = "" if count is None else f" ({count} tokens)"
            self.notes.append(f"The tokenizer is that of {self._owner(self.tokenizer, self.chosen)}{size}.")
        said = {m.name: texts(t) for m in self.order if (t := self.templates[id(m)][1])}
        lacking = sorted(m.name for m in self.order if m.name not in said)
        if len(set(said.values())) > 1 or (said and lacking):
            home = self.templates[id(self.speaker)][0] or self.speaker.own.folder
            why = (
                "the chat templates differ"
                if len(set(said.values())) > 1
                else f"{some(lacking)} {'has' if len(lacking) == 1 else 'have'} none"
            )
            self.notes.append(f"The chat template is that of {self._owner(home, self.speaker)}; {why}.")
        for folder in self._places():
            count, last = extent(folder)
            if count is not None and not fits(folder, self.rows):
                kept = "it is taken, as no other fits" if folder == self.tokenizer else "it is not taken"
                self.notes.append(
                    f"The tokenizer of {self.names[folder]} has {count} tokens up to id {last}, and the embedding {self.rows} rows; "
                    f"{kept}."
                )

    @staticmethod
    def _owner(folder: Path, member: Member) -> str:
        return member.name if folder == member.own.folder else f"{member.checkpoint.name}, the base of {member.name}"


def _templates(member: Member) -> tuple[Path | None, Mapping[str, Path | str]]:
    return next(((p, t) for p in places(member) if (t := templates(p))), (None, {}))


def _digest(folder: Path) -> tuple[tuple[str, str], ...]:
    return tuple((n, hashlib.sha256(p.read_bytes()).hexdigest()) for n, p in tokenizer_files(folder).items())


def _read(file: Path) -> dict[str, Any]:
    with as_merge_error():
        return read_object(file)


def write_side_files(
    out: Path, files: Mapping[str, Path | str], config: Mapping[str, Any], original: Path | None, adapter: bool
) -> None:
    """Copy the files, and write the configuration.

    Args:
        out: The output folder.
        files: Name in the output -> source, or its text.
        config: The configuration.
        original: File with exactly this content, to be copied byte for byte, or None.
        adapter: Whether it is an adapter's configuration.
    """
    for name, source in files.items():
        if isinstance(source, str):
            write_text(out / name, source)
        else:
            copy(source, out / name)
    target = out / (ADAPTER_CONFIG if adapter else CONFIG)
    if original is not None:
        copy(original, target)
    else:
        write_text(target, json.dumps(config, indent=2, sort_keys=adapter, ensure_ascii=False) + "\n")


def copy(source: Path, target: Path) -> None:
    """Copy a file's bytes and flush them to disk; permissions follow the umask."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as read, target.open("wb") as written:
        shutil.copyfileobj(read, written)
        written.flush()
        os.fsync(written.fileno())
