"""`hf-continual merge METHOD`: one command for all merges, a summary at the end."""

from __future__ import annotations

import json
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_continual.merging.by_name import METHODS, read_set, run_file, run_merge

__all__ = ["METHODS", "merge", "run_merge"]

_recall, _kif, _both, _output, _publish = (
    partial(typer.Option, rich_help_panel=panel)
    for panel in ("Options of recall", "Options of kif", "Options of recall and kif", "Output", "Publishing")
)


def merge(
    method: Annotated[
        str | None, typer.Argument(help=f"One of {', '.join(METHODS)}; or your own, package.module:Class.")
    ] = None,
    models: Annotated[
        list[str] | None, typer.Argument(help="Folders or Hub ids (id@revision), models or adapters, oldest first.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder; complete or absent.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="The merge as a file, with these names as keys, or mergekit's YAML.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="An option of the method, NAME=VALUE, such as density=0.1.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The full model that adapters sit on, or that was tuned.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="linear: numbers such as 0.7,0.3. recall: a recall_report.json to repeat.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="interpolate: share of the way from base to tuned.")] = None,
    scale: Annotated[str | None, typer.Option(help="lambda of task vectors, one number or one per model.")] = None,
    density: Annotated[
        float | None, typer.Option(help="ties, dare, breadcrumbs: share of each task vector that is kept.")
    ] = None,
    calibration: Annotated[Path | None, _recall(help="Texts of the newest task, .jsonl or .txt.")] = None,
    self_calibration: Annotated[bool, _recall("--self-calibration", help="The newest model writes the texts.")] = False,
    include_base: Annotated[
        bool | None,
        _recall("--include-base/--no-include-base", help="Whether the base is one of the models."),
    ] = None,
    num_typical: Annotated[int | None, _recall(help="Texts that all models see.")] = None,
    bandwidth: Annotated[str | None, _recall(help="anchor_spread, dim, or sigma.")] = None,
    temperature: Annotated[float | None, _both(help="Of the softmax; of kif's rule adaptive.")] = None,
    anchor: Annotated[str | None, _recall(help="The newest model, by place or name.")] = None,
    pool_size: Annotated[int | None, _recall(help="Texts that are clustered.")] = None,
    max_length: Annotated[int | None, _both(help="Tokens per text of the calibration.")] = None,
    reference: Annotated[str | None, _recall(help="Compare with the anchor, or all_pairs.")] = None,
    nonblock: Annotated[
        str | None,
        _recall(help="Embeddings, norm, head: representation, uniform, anchor or base."),
    ] = None,
    calibration_dtype: Annotated[str | None, _both(help="Type models run in.")] = None,
    uncertainty: Annotated[
        bool | None,
        _kif("--uncertainty/--no-uncertainty", help="Whether importance counts times its uncertainty."),
    ] = None,
    beta1: Annotated[float | None, _kif(help="Decay of the importance over batches.")] = None,
    beta2: Annotated[float | None, _kif(help="Decay of its uncertainty.")] = None,
    order: Annotated[str | None, _kif(help="Taylor terms: first, second or mixed.")] = None,
    batch_size: Annotated[int | None, _kif(help="Rows per batch of calibration.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of recall's clustering; of what dare drops.")] = None,
    device: Annotated[str | None, _both(help="Where models run for calibration.")] = None,
    importance: Annotated[
        str | None,
        _kif(help="Checkpoint of a run with KIF, or files of scores as NEW,OLD."),
    ] = None,
    calibration_new: Annotated[str | None, _kif(help="Rows of the new task, file or Hub id.")] = None,
    calibration_old: Annotated[str | None, _kif(help="Rows of old tasks, file or Hub id.")] = None,
    rule: Annotated[str | None, _kif(help="code, paper, no_shared, adaptive or weighted.")] = None,
    top_share: Annotated[float | None, _kif(help="Share of elements that matter to a side.")] = None,
    scope: Annotated[str | None, _kif(help="One threshold, global, or one per tensor.")] = None,
    old_from: Annotated[str | None, _kif(help="What OLD was trained from, base or new.")] = None,
    base_model: Annotated[str | None, _kif(help="Full model that adapters sit on, for calibration.")] = None,
    low_memory: Annotated[bool, _recall("--low-memory", help="Read blocks from the disk as needed.")] = False,
    output: Annotated[
        str | None,
        _output(help="model or adapter; by default an adapter if that is exact."),
    ] = None,
    adapter_rank: Annotated[int | None, _output(help="Rank of an adapter output; by default the exact sum.")] = None,
    dtype: Annotated[
        str | None,
        _output(help="float32, bfloat16 or float16; by default the first model's."),
    ] = None,
    max_shard_size: Annotated[str | None, _output(help="Size of a file, such as 5GB.")] = None,
    vocab: Annotated[
        str | None,
        _output(help="strict, or extend for vocabularies that continue a shorter one."),
    ] = None,
    overwrite: Annotated[
        bool,
        _output("--overwrite", help="Replace the output once the new one is complete."),
    ] = False,
    fresh: Annotated[bool, _output("--fresh", help="Do not go on from an interrupted merge.")] = False,
    dry_run: Annotated[
        bool,
        _output("--dry-run", help="Make every check, print the plan, write nothing."),
    ] = False,
    quantized_base: Annotated[
        str | None,
        _output(help="Base of adapters trained in 4 or 8 bits: original, dequantize, error, or JSON that says how."),
    ] = None,
    push_to_hub: Annotated[str | None, _publish(help="Hub id to publish the result at.")] = None,
    private: Annotated[
        bool | None,
        _publish("--private/--public", help="Whether a new repository is private."),
    ] = None,
    license: Annotated[str | None, _publish(help="Licence id, where the inputs' licences differ.")] = None,
    quiet: Annotated[bool, _output("--quiet", help="No progress bar and no log.")] = False,
) -> None:
    """Merge checkpoints into one, a chunk at a time: models are never in memory."""
    given = {
        "weights": weights, "alpha": alpha, "scale": scale, "density": density, "bandwidth": bandwidth,
        "calibration": calibration, "calibration_mode": "self" if self_calibration else None, "include_base": include_base,
        "num_typical": num_typical, "temperature": temperature, "anchor": anchor, "seed": seed, "device": device,
        "low_memory": low_memory or None, "importance": importance, "calibration_new": calibration_new,
        "calibration_old": calibration_old, "rule": rule, "top_share": top_share, "scope": scope, "old_from": old_from,
        "base_model": base_model, "pool_size": pool_size, "max_length": max_length, "reference": reference, "nonblock": nonblock,
        "calibration_dtype": calibration_dtype, "uncertainty": uncertainty, "beta1": beta1, "beta2": beta2, "order": order,
        "batch_size": batch_size,
    }  # fmt: skip
    written = {
        "output": output, "adapter_rank": adapter_rank, "dtype": dtype, "max_shard_size": max_shard_size, "vocab": vocab,
        "overwrite": overwrite, "resume": not fresh, "dry_run": dry_run, "progress": False if quiet else None,
        "push_to_hub": push_to_hub, "private": private, "license": license,
        "quantized_base": _choice(quantized_base),
    }  # fmt: skip
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, format="%(message)s", stream=sys.stderr)
    for other in ("httpx", "huggingface_hub", "matplotlib", "bitsandbytes"):
        logging.getLogger(other).setLevel(logging.ERROR)
    chosen = {k: v for k, v in given.items() if v is not None}
    if config is not None:
        run_file(config, method, models, out, base, {**chosen, **read_set(set_)}, written)
        return
    if method is None or not models or out is None:
        raise ValueError("a merge needs METHOD, MODELS and --out; or --config FILE.")
    run_merge(method, models, out, base, {**chosen, **read_set(set_)}, written)


def _choice(quantized_base: str | None) -> Any:
    if quantized_base is None or not quantized_base.lstrip().startswith("{"):
        return quantized_base
    try:
        return json.loads(quantized_base)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"--quantized-base {quantized_base!r} is no JSON: {error}. Write for example "
            '--quantized-base \'{"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}\'.'
        ) from None
