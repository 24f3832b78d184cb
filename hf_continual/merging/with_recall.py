"""`merge_with_recall`: opens models, finds RECALL's weights (or takes given ones), and hands the average to the engine."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hf_continual.merging.average import Average
from hf_continual.merging.checkpoints import Checkpoint
from hf_continual.merging.errors import MergeError
from hf_continual.merging.given_weights import read_weights, warn_other_base
from hf_continual.merging.heat_map import save_heat_map
from hf_continual.merging.job import REPORT, Job
from hf_continual.merging.members import Member, open_members
from hf_continual.merging.options import read_output
from hf_continual.merging.publishing import check_push
from hf_continual.merging.quantized import QuantizedBase
from hf_continual.merging.recall import PAPER, Bandwidth
from hf_continual.merging.recall_weights import calibrated, check_choices
from hf_continual.merging.result import MergeResult, RecallMergeResult
from hf_continual.merging.run import digest_of, finished_as_asked, make_plan, run_job
from hf_continual.merging.structure import groups_of, ordered
from hf_continual.merging.workplace import check_free, locked

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

RECALL_REPORT, HEAT_MAP = "recall_report.json", "recall_weights.png"


class RecallMergeError(MergeError):
    """A `MergeError` of `merge_with_recall`."""


def merge_with_recall(
    models: Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    calibration: Sequence[str] | Sequence[Mapping[str, Any]] | Dataset | None = None,
    calibration_mode: Literal["data", "self"] = "data",
    anchor: int | str = -1,
    include_base: bool | Literal["auto"] = "auto",
    num_typical: int = 20,
    pool_size: int = 512,
    max_length: int = 512,
    seed: int = 0,
    bandwidth: Bandwidth = "anchor_spread",
    temperature: float = 1.0,
    reference: Literal["anchor", "all_pairs"] = "anchor",
    nonblock: Literal["representation", "uniform", "anchor", "base"] = "representation",
    weights: Mapping[str, Sequence[float]] | str | os.PathLike[str] | None = None,
    output: Literal["model", "adapter"] | None = None,
    adapter_rank: int | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    vocab: Literal["strict", "extend"] = "strict",
    device: str | None = None,
    calibration_dtype: str | None = None,
    low_memory: bool = False,
    resume: bool = True,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool | None = None,
    quantized_base: QuantizedBase = "original",
    push_to_hub: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    license: str | None = None,
) -> RecallMergeResult:
    """Merge models of a sequence of tasks with one weight per model and layer, found from representations.

    No data of earlier tasks is needed: texts of the newest task, or none at all with ``calibration_mode="self"``.
    Several experts at once (joint), or the merge so far and the newest (running). The weights are never in memory.

    Example:
        >>> merge_with_recall(["law", "tax", "tickets"], "merged", base="Qwen/Qwen2.5-0.5B", calibration=ticket_rows)
        >>> merge_with_recall(["law", "tax", "tickets"], "again", base="...", weights="merged/recall_report.json")

    Args:
        models: Full models and LoRA adapters in any mix, oldest first, newest last: folders or ``"id@revision"``.
        output_dir: Where the result goes; complete or absent.
        base: The full model that adapters sit on; a single model is merged with it.
        calibration: Texts of the newest task, or rows with text, messages, or prompt and completion.
        calibration_mode: ``"self"`` lets the newest model write the texts.
        anchor: The newest model, by place or name.
        include_base: Whether the base is one of the models; ``"auto"``: with a single expert only.
        num_typical: Texts that all models see, one per cluster.
        pool_size: Texts that are clustered, evenly spaced in `calibration`.
        max_length: Tokens per text.
        seed: Seed of the clustering, and of the texts of ``"self"``.
        bandwidth: sigma of the similarity, see `layer_weights`.
        temperature: Of the softmax over models.
        reference: Whether models are compared with the anchor or with all.
        nonblock: Weights of embeddings, final norm and head: from their representations, equal, the anchor alone, or
            the base alone.
        weights: A ``recall_report.json`` to repeat, or one list per group (``"embed"``, ``"layer.0"``, ..., ``"final"``;
            ``"default"`` for those not named); skips calibration.
        output: ``"model"``, ``"adapter"``, or None: an adapter if all models are adapters of one base.
        adapter_rank: Rank of an adapter output; None keeps the exact sum.
        dtype: Type of the output's weights; None keeps the first model's, tensor by tensor.
        max_shard_size: Bytes per file.
        vocab: ``"extend"`` allows vocabularies that continue a shorter one.
        device: Where models run for calibration; None: the accelerator if there is one.
        calibration_dtype: Type they run in; None: the checkpoint's, on a CPU never float16.
        low_memory: Whether their blocks are read from the disk as needed.
        resume: Whether an interrupted merge of the same inputs goes on.
        overwrite: Whether an output folder that holds something is replaced, once the new one is complete.
        dry_run: Whether to make every check, print the plan, and write nothing.
        progress: Whether to show a progress bar; None: if the standard error is a terminal.
        quantized_base: Where adapters go that were trained on a base in 4 or 8 bits: onto the ``"original"`` `base`;
            onto what they saw of it (``"dequantize"``, or a `BitsAndBytesConfig` or its dictionary); or ``"error"``.
        push_to_hub: Hub id to publish the result at, checked before the merge, see `hf_continual.push_to_hub`.
        private: Whether a new repository is private; None: the account's default, or as it is.
        token: Access token; by default that of HF_TOKEN or ``hf auth login``.
        license: Licence of the result; needed to publish where the models' differ.

    Returns:
        Where the result is, the weights and how they came about.

    Raises:
        ValueError: If an argument does not fit.
        RecallMergeError: If the models do not, or a file changes meanwhile.
        FileExistsError: If the output folder is in use.
        OSError: If the disk is full.
    """
    given = {
        "output": output, "adapter_rank": adapter_rank, "dtype": dtype, "max_shard_size": max_shard_size, "vocab": vocab,
        "resume": resume, "overwrite": overwrite, "dry_run": dry_run, "progress": progress,
        "quantized_base": quantized_base, "push_to_hub": push_to_hub, "private": private, "token": token, "license": license,
    }  # fmt: skip
    choices = {
        "include_base": include_base, "num_typical": num_typical, "pool_size": pool_size, "max_length": max_length,
        "seed": seed, "bandwidth": bandwidth, "temperature": temperature, "reference": reference, "nonblock": nonblock,
        "calibration_mode": calibration_mode,
    }  # fmt: skip
    target = Path(output_dir)
    options = read_output(given)
    asked: dict[str, Any] | None = None
    try:
        members, place, full = _members(models, base, include_base, anchor, quantized_base)
        if full is not None and full.seen_as is not None and low_memory and weights is None:
            raise ValueError(
                "low_memory=True reads blocks from the disk as they are, and quantized_base asks for other values. Leave one out."
            )
        with_base = members[0].adapter is None and members[0].checkpoint is full
        names = list(dict.fromkeys(n for m in members for n in m.names))
        if weights is not None:
            groups, found = read_weights(
                weights, len(members), names, members[0].checkpoint.config, [m.name for m in members]
            )
            facts: dict[str, Any] = {}
            warn_other_base(weights, full)
        else:
            groups = groups_of(names, members[0].checkpoint.config)
            check_choices(calibration, choices, with_base, dry_run)
            asked = {**choices, "anchor": place, "calibration": digest_of(calibration)}
            equal_weights = Average((1 / len(members),) * len(members))
            checked = Job(
                "recall",
                PAPER,
                members,
                full,
                lambda _: equal_weights,
                choices,
                newest=place,
                report=RECALL_REPORT,
                asked=asked,
            )
            plan, _ = make_plan(checked, target, options)
            if (done := finished_as_asked(checked, target, options)) is not None:
                found = done.report["weights"]
                return _recall_result(done, found, done.report, members, place)
            if dry_run:
                equal = {g: [1 / len(members)] * len(members) for g in ordered(groups.values())}
                found, facts = equal, {}
            else:
                check_free(target, overwrite)
                check_push(checked, options, plan.kind)
                with locked(target):
                    found, facts = calibrated(
                        members, place, with_base, calibration, choices, target, (device, calibration_dtype, low_memory)
                    )
        job = _job(members, place, full, groups, found, facts, choices if weights is None else {})
        if weights is None and not dry_run:
            job = replace(job, asked=asked)
        result = run_job(job, target, given)
    except MergeError as error:
        raise RecallMergeError(*error.args) from error
    return _recall_result(result, found, facts, members, place)


def _recall_result(
    result: MergeResult, found: Mapping[str, Any], facts: Mapping[str, Any], members: Sequence[Member], place: int
) -> RecallMergeResult:
    order = tuple(found)
    return RecallMergeResult(
        **{name: getattr(result, name) for name in MergeResult.__dataclass_fields__},
        groups=order,
        weights=_array(found, order),
        similarity=_array(facts.get("similarity"), order),
        sigma2=_array(facts.get("sigma2"), order),
        model_names=tuple(m.name for m in members),
        anchor=place,
    )


def _array(by_group: Mapping[str, Any] | None, groups: Sequence[str]) -> np.ndarray | None:
    return None if by_group is None else np.array([by_group[g] for g in groups]).T


def _members(
    models: Sequence[str | os.PathLike[str]],
    base: str | os.PathLike[str] | None,
    include_base: bool | str,
    anchor: int | str,
    quantized_base: QuantizedBase,
) -> tuple[list[Member], int, Checkpoint | None]:
    experts, full = open_members(models, base, quantized_base)
    if isinstance(anchor, str):
        called = [m.name for m in experts]
        if anchor not in called:
            raise ValueError(f"anchor={anchor!r} is none of the models: {', '.join(called)}.")
        anchor = called.index(anchor)
    if not -len(experts) <= anchor < len(experts):
        raise ValueError(f"anchor={anchor} is out of range: there are {len(experts)} models.")
    place = anchor % len(experts)
    with_base = len(experts) == 1 if include_base == "auto" else bool(include_base)
    if with_base and full is None:
        raise ValueError(
            f"{experts[0].name} is the only model, and there is no base to merge it with: give base=, or a second model."
            if len(experts) == 1
            else "include_base=True needs base=."
        )
    if with_base and full is not None:
        return [Member(full), *experts], place + 1, full
    if len(experts) == 1:
        raise ValueError(
            f"{experts[0].name} is the only model: with include_base=False there is nothing to merge it with."
        )
    return experts, place, full


def _job(
    members: Sequence[Member], anchor: int, base: Checkpoint | None, groups: Mapping[str, str],
    weights: Mapping[str, Sequence[float]], facts: Mapping[str, Any], choices: Mapping[str, Any],
) -> Job:  # fmt: skip
    rules = {g: Average(tuple(w)) for g, w in weights.items()}
    known = {
        "groups": list(weights),
        "weights": {g: list(w) for g, w in weights.items()},
        "anchor": members[anchor].name,
    }
    before = any((m.own.folder / name).is_file() for m in members for name in (RECALL_REPORT, REPORT))
    known["mode"] = "running" if before else "joint"

    def draw(out: Path) -> None:
        save_heat_map(weights, [m.name for m in members], out / HEAT_MAP)

    return Job(
        "recall", PAPER, members, base, lambda name: rules[groups[name]], choices, newest=anchor, report=RECALL_REPORT,
        facts={**known, **facts}, evidence=draw, image=HEAT_MAP,
    )  # fmt: skip
