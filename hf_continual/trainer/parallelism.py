"""Which methods run under which parallelism, derived from their hooks; drives the refusals and the table of recipes/guide/processes.md.

Every cell that is not refused here is trained by a test with two processes, and compared with one process with
twice the accumulation (`tests/distributed`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType

from hf_continual.data.distributed import gathered
from hf_continual.methods.compose import kind_of, overrides
from hf_continual.methods.table import TABLE, method_class

if TYPE_CHECKING:
    from hf_continual.methods.base import Method
    from hf_continual.trainer.live import LiveTrainer

ONE = "one process"
ZERO = ("ZeRO-1", "ZeRO-2", "ZeRO-3")
MODES = (ONE, "DDP", "FSDP2", *ZERO)
WEIGHTS = ("full", "LoRA", "4-bit LoRA")

_ENGINE = "changes gradients or weights between backward and step, and DeepSpeed does both inside its engine"
_FLAT = "supplies an optimizer that must know each parameter, and DeepSpeed hands an optimizer flat pieces of many"
_SPREAD = "reads the weights before training, and ZeRO-3 has sharded them over the processes by then"
_HEAD = "computes logits with the whole language-model head, and FSDP shards it over the processes"
_ANSWERS = "writes answers with whole weights when the task ends, and they are sharded over the processes"
_FSDP1 = "must see each parameter, and FSDP1 flattens many into one"
_OUTSIDE = "runs forward passes between steps, outside the engine that gathers spread weights"
_OUT = "Use DDP or FSDP2 (recipes/accelerate), or drop the method."

# Kind of method -> mode -> why it is refused there, although its hooks alone would not show it, and what to do.
READS_WEIGHTS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    **{
        kind: {"ZeRO-3": (_SPREAD, "Use ZeRO-2, DDP or FSDP2, or drop the method.")}
        for kind in ("l2p", "moe_lora", "sapt_lora", "mask_surprising", "slao")
    },
    "gere": {"ZeRO-3": (_SPREAD, "Use ZeRO-2, DDP or FSDP2, or GeRe(constraint='none'), which reads no weights.")},
    "lamol": {"ZeRO-3": (_SPREAD, "Use ZeRO-2, DDP or FSDP2, or LAMOL(gamma=0), which writes no samples.")},
    "kl_to_base": {
        "FSDP1": (_HEAD, "Use DDP or ZeRO-2, or KLToBase(weight=0)."),
        "FSDP2": (_HEAD, "Use DDP or ZeRO-2, or KLToBase(weight=0)."),
        "ZeRO-3": (_SPREAD, "Use ZeRO-2 or DDP, or KLToBase(weight=0)."),
    },
    "lfpt5": {
        "FSDP1": (_HEAD, "Use DDP, or LAMOL, which distils nothing."),
        "FSDP2": (_HEAD, "Use DDP, or LAMOL, which distils nothing."),
        "ZeRO-3": (_SPREAD, "Use ZeRO-2 or DDP, or LFPT5(gamma=0), which writes no samples."),
    },
    "on_policy_replay": {
        mode: (_ANSWERS, "Use DDP or ZeRO-2, or OnPolicyReplay(share=0), which writes no answers.")
        for mode in ("FSDP1", "FSDP2", "ZeRO-3")
    },
}
# Hook that a method overrides -> why it is refused under DeepSpeed.
CALLS = {
    "begin_step": _ENGINE,
    "edit_gradients": _ENGINE,
    "after_step": _ENGINE,
    "end_step": _ENGINE,
    "optimizer": _FLAT,
}


def mode_of(trainer: LiveTrainer) -> str:
    """The parallelism in use: a name of `MODES`, or another such as ``"FSDP1"`` that is not in the table."""
    state: Any = trainer.accelerator.state
    if state.distributed_type == DistributedType.DEEPSPEED:
        return f"ZeRO-{state.deepspeed_plugin.zero_stage}"
    if state.distributed_type == DistributedType.FSDP:
        return f"FSDP{state.fsdp_plugin.fsdp_version}"
    return ONE if state.distributed_type == DistributedType.NO else "DDP"


def refusal(method: Method, mode: str) -> tuple[str, str] | None:
    """Why a method cannot run in a mode, and what to do; None if it can.

    Args:
        method: The method.
        mode: See `mode_of`.

    Returns:
        Reason and remedy, as parts of a sentence.
    """
    found = _by_what_it_does(type(method), mode)
    # Modules that a method supplies are put onto whole weights, before they are sharded.
    if found is None and (method.reads_reference() or overrides(type(method), "adapter")):
        found = READS_WEIGHTS.get(kind_of(type(method)), {}).get(mode)
        if found is None and mode == "ZeRO-3":
            return _SPREAD, "Use ZeRO-2, DDP or FSDP2, or drop the method."
    return found


def _by_what_it_does(method: type[Method], mode: str) -> tuple[str, str] | None:
    if method.watches:
        return (_OUTSIDE, "Use DDP, FSDP2 or ZeRO-2, or train without gauges.") if mode in ("ZeRO-3", "FSDP1") else None
    touched = [call for call in CALLS if overrides(method, call)]
    if mode.startswith("ZeRO") and touched:
        return CALLS[touched[0]], _OUT
    if mode == "FSDP1" and touched:
        return _FSDP1, "Set fsdp_version: 2 (recipes/accelerate/fsdp2.yaml), or drop the method."
    return None


def refused(kind: str) -> dict[str, tuple[str, str]]:
    """Modes in which a method of the table is refused, with the reason and a remedy.

    Args:
        kind: A key of the table of methods.

    Returns:
        Reason and remedy by a name of `MODES`.
    """
    found = {mode: _by_what_it_does(method_class(kind), mode) for mode in MODES}
    return {**{mode: why for mode, why in found.items() if why is not None}, **READS_WEIGHTS.get(kind, {})}


def check_parallelism(trainer: LiveTrainer) -> None:
    """Refuse methods that cannot run in this mode, and processes that have different numbers of rows.

    Args:
        trainer: The trainer, set up except for its methods.

    Raises:
        ValueError: With the reason and a remedy.
    """
    mode = mode_of(trainer)
    for method in trainer.methods:
        if (found := refusal(method, mode)) is not None:
            raise ValueError(f"{type(method).__name__} under {mode}: it {found[0]}. {found[1]}")
    if trainer.args.world_size > 1:
        check_same_rows(trainer)


def check_same_rows(trainer: LiveTrainer) -> None:
    """Refuse processes with different rows: the trainer splits the rows itself."""
    rows: Any = trainer.train_dataset
    counts = gathered(len(rows) if hasattr(rows, "__len__") else None)
    if len(set(counts)) > 1:
        raise ValueError(
            f"The processes have different numbers of training rows: {', '.join(map(str, counts))} (in the order of the "
            f"processes). The trainer splits rows itself, and the others would wait for the one that runs out. Give all "
            f"processes the same whole dataset."
        )


def table() -> list[str]:
    """The table in Markdown: ``yes``, or ``-`` if the method is refused at construction."""
    lines = [f"| method | {' | '.join(MODES)} |", "|---" * (len(MODES) + 1) + "|"]
    for kind in TABLE:
        cells = ["-" if mode in refused(kind) else "yes" for mode in MODES]
        lines.append(f"| `{kind}` | {' | '.join(cells)} |")
    return lines
