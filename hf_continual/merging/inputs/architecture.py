"""Whether a model's files hold what its architecture needs, and how its weights are oriented; see `architecture_probe`."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_continual.merging.errors import MergeError, some
from hf_continual.merging.inputs.checkpoint import Checkpoint
from hf_continual.merging.inputs.structure import number_of_blocks

# Keys of a configuration that no weight depends on; models that differ only in these are probed once.
_IDLE = ("dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache")
_MOST_BLOCKS = 10  # blocks for each stored tensor: a larger number cannot be right, and would take forever to build
_CODE = (
    "import json, sys\n"
    "data = json.load(sys.stdin)\n"
    "sys.path[:] = data['path']\n"
    "from hf_continual.merging.inputs import architecture_probe\n"
    "answer = getattr(architecture_probe, data['function'])(data['question'])\n"
    "print()\n"
    "print(json.dumps(answer))\n"
)


@dataclass(frozen=True)
class Architecture:
    """A model as transformers would load it.

    Args:
        unknown: Why nothing is known about it, or None.
        transposed: Module -> whether its weight is stored ``(in, out)``; only for modules that adapters have factors for.
        names: Name of a tensor in the loaded model -> its name in the files, if the two differ.
        adapters: For each adapter, how PEFT reads it: ``refused``, ``unknown``, ``missing``, ``unexpected``.
    """

    unknown: str | None
    transposed: Mapping[str, bool]
    names: Mapping[str, str]
    adapters: tuple[Mapping[str, Any], ...] = ()


def read_architecture(model: Checkpoint, adapters: Sequence[tuple[Checkpoint, Iterable[str]]] = ()) -> Architecture:
    """Build a model without values and compare it with what is stored; a model is probed once per process.

    Args:
        model: A full model.
        adapters: The adapters on it, each with the modules that its file has factors for.

    Returns:
        What is known about it.

    Raises:
        MergeError: If tensors are missing or have another shape than the architecture's, or its configuration does not describe a
            model that can be built.
    """
    blocks = number_of_blocks(model.config)
    if blocks is not None and blocks > _MOST_BLOCKS * (len(model.tensors) + _MOST_BLOCKS):
        raise MergeError(
            f"config.json of {model.name} says {blocks} blocks, but its files hold {len(model.tensors)} tensors. Download or "
            f"save the model again."
        )
    question = {
        "config": {k: v for k, v in model.config.items() if k not in _IDLE},
        "tensors": _layout(model),
        "adapters": [
            {"config": dict(a.config), "tensors": _layout(a), "modules": sorted(modules)} for a, modules in adapters
        ],
    }
    answer = _ask(question)
    if answer["refused"] is not None:
        raise MergeError(
            f"transformers cannot build {model.name} from its config.json ({answer['refused'][:300]}), so it could not load the "
            f"result. Fix that file, or save the model again."
        )
    if missing := answer["missing"]:
        raise MergeError(
            f"{model.name} lacks {len(missing)} tensors that its architecture needs ({some(missing)}); transformers would "
            f"initialise them at random. The model is incomplete: download it or save it again"
            + (
                " (or set tie_word_embeddings in config.json, if its head is its embedding)."
                if _heads(missing)
                else "."
            )
        )
    if wrong := answer["mismatched"]:
        name, have, want = wrong[0]
        raise MergeError(
            f"{model.name}: {name!r} is {have} in its files but {want} by its config.json ({len(wrong)} such tensors). The two "
            f"do not belong together; download or save the model again."
        )
    return Architecture(answer["unknown"], answer["transposed"], answer["names"], tuple(answer["adapters"]))


def _layout(model: Checkpoint) -> dict[str, list[Any]]:
    return {n: [t.dtype, list(t.shape)] for n, t in model.tensors.items()}


def _heads(missing: Sequence[str]) -> bool:
    return len(missing) == 1 and missing[0].endswith(("lm_head.weight", "embed_out.weight"))


def check_whole(models: Iterable[Checkpoint]) -> list[str]:
    """Compare full models with their architectures.

    Args:
        models: The models; adapters are skipped.

    Returns:
        A note for each architecture that is not known and could not be compared.

    Raises:
        MergeError: If one is incomplete.
    """
    notes: dict[str, None] = {}
    for model in {m.folder: m for m in models if not m.is_adapter}.values():
        if (why := read_architecture(model).unknown) is not None:
            notes[f"Whether {model.name} holds every tensor that its architecture needs was not checked: {why}."] = None
    return list(notes)


# A merge asks again each time it makes a plan, and an answer may need a process that imports transformers.
_answers: dict[str, dict[str, Any]] = {}
_meanings: dict[str, list[dict[str, Any]]] = {}


def _ask(question: dict[str, Any]) -> dict[str, Any]:
    """The answer of `architecture_probe.probe`; its part about the model alone is cached."""
    key = _digest(question)
    if key not in _answers:
        _answers[key] = _answers[_digest({**question, "adapters": []})] = _probe(question)
    return _answers[key]


def _digest(question: Any) -> str:
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


def _probe(question: dict[str, Any]) -> dict[str, Any]:
    return _call("probe", question)


def understood(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How transformers reads configurations, whichever version wrote them.

    Args:
        configs: What the files hold.

    Returns:
        For each, the answer of `architecture_probe.understand`.
    """
    question = [dict(c) for c in configs]
    key = _digest(question)
    if key not in _meanings:
        _meanings[key] = _call("understand", question)
    return _meanings[key]


def _call(function: str, question: Any) -> Any:
    """Call a function of `architecture_probe`, in a separate process if transformers is not loaded here."""
    if "transformers" in sys.modules:
        from hf_continual.merging.inputs import architecture_probe

        return getattr(architecture_probe, function)(question)
    told = json.dumps({"path": sys.path, "function": function, "question": question})
    done = subprocess.run([sys.executable, "-c", _CODE], input=told, text=True, capture_output=True)
    if done.returncode != 0:
        raise RuntimeError(f"the architecture could not be compared: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])
