"""`hf-continual merge METHOD`: one command for all merges, a summary at the end."""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_continual.disk import size
from hf_continual.named import imported

# Name -> function, and which options beside those of every merge it takes. No registry: this is the list.
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "recall": (
        "hf_continual.merging.with_recall:merge_with_recall",
        (
            "weights", "calibration", "calibration_mode", "include_base", "num_typical", "pool_size", "max_length", "bandwidth",
            "temperature", "reference", "nonblock", "anchor", "seed", "device", "calibration_dtype", "low_memory",
        ),
    ),
    "linear": ("hf_continual.merging.linear:merge_linear", ("weights",)),
    "interpolate": ("hf_continual.merging.interpolate:interpolate", ("alpha",)),
    "task-arithmetic": ("hf_continual.merging.task_arithmetic:task_arithmetic", ("scale",)),
    "ties": ("hf_continual.merging.ties:ties", ("density", "scale")),
    "magnitude-max": ("hf_continual.merging.magnitude_max:magnitude_max", ("scale",)),
    "kif": (
        "hf_continual.merging.kif:kif_fuse",
        (
            "importance", "calibration_new", "calibration_old", "rule", "top_share", "scope", "temperature", "old_from",
            "base_model", "device", "uncertainty", "beta1", "beta2", "order", "batch_size", "max_length", "calibration_dtype",
        ),
    ),
}  # fmt: skip


_recall, _kif, _both, _output, _publish = (
    partial(typer.Option, rich_help_panel=panel)
    for panel in ("Options of recall", "Options of kif", "Options of recall and kif", "Output", "Publishing")
)


def merge(
    method: Annotated[str, typer.Argument(help=f"One of {', '.join(METHODS)}.")],
    models: Annotated[
        list[str], typer.Argument(help="Folders or Hub ids (id@revision), models or adapters, oldest first.")
    ],
    out: Annotated[Path, typer.Option(help="Output folder; complete or absent.")],
    base: Annotated[str | None, typer.Option(help="The full model that adapters sit on, or that was tuned.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="linear: numbers such as 0.7,0.3. recall: a recall_report.json to repeat.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="interpolate: share of the way from base to tuned.")] = None,
    scale: Annotated[str | None, typer.Option(help="lambda of task vectors, one number or one per model.")] = None,
    density: Annotated[float | None, typer.Option(help="ties: share of each task vector that is kept.")] = None,
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
    seed: Annotated[int | None, _recall(help="Seed of the clustering.")] = None,
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
    run_merge(method, models, out, base, {k: v for k, v in given.items() if v is not None}, written)


def run_merge(
    method: str, models: list[str], out: Path, base: str | None, given: dict[str, Any], written: dict[str, Any]
) -> None:
    """Call the method's function with what was given, and say what came out.

    Args:
        method: Its name.
        models: The models.
        out: The output folder.
        base: The base, or None.
        given: Options of the method.
        written: Options of every merge.

    Raises:
        ValueError: If there is no such method, or it does not take an option.
    """
    if method not in METHODS:
        raise ValueError(f"there is no merge {method!r}; there are {', '.join(METHODS)}.")
    where, known = METHODS[method]
    if strange := [k for k in given if k not in known]:
        takes = ", ".join("--" + k.replace("_", "-") for k in known)
        raise ValueError(f"merge {method} does not take --{strange[0].replace('_', '-')}; it takes {takes}.")
    if method == "recall" or any(k.startswith("calibration") for k in given):
        _quiet_transformers()
    function = imported(where)
    options = {
        **{k: _value(method, k, v) for k, v in given.items()},
        **{k: v for k, v in written.items() if v is not None},
    }
    if method == "interpolate":
        if base is None or len(models) != 1 or "alpha" not in options:
            raise ValueError(f"merge interpolate needs one model (got {len(models)}), --base and --alpha.")
        result = function(base, models[0], out, **options)
    elif method == "kif":
        if base is None or len(models) not in (1, 2):
            raise ValueError(
                f"merge kif needs [OLD] NEW (got {len(models)} models) and --base, which both started from."
            )
        old = models[0] if len(models) == 2 else None
        result = function(base, models[-1], out, old=old, **options)
    elif base is None and method in ("task-arithmetic", "ties", "magnitude-max"):
        raise ValueError(f"merge {method} needs --base, the model that the others were tuned from.")
    else:
        result = function(models, out, base=base, **options)
    if not written["dry_run"]:
        seconds = ", ".join(f"{k} {v:.1f} s" for k, v in result.seconds.items())
        form = result.kind if result.rank is None else f"{result.kind} of rank {result.rank}"
        typer.echo(f"{form} in {result.output_dir}  ({size(result.bytes_written)}; {seconds})")


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


def _quiet_transformers() -> None:
    import datasets
    from transformers.utils import logging as hf_logging

    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing.*` is deprecated", FutureWarning)
    datasets.disable_progress_bars()
    hf_logging.disable_progress_bar()


def _value(method: str, key: str, value: Any) -> Any:
    if key == "calibration":
        from hf_continual.data.rows import load_rows

        return load_rows(str(value))
    if key == "weights":
        if method == "recall":
            text = str(value).lstrip()
            return json.loads(text) if text.startswith("{") else value
        return _numbers(key, value)
    if key == "anchor":
        return int(value) if re.fullmatch(r"-?\d+", value) else value
    if key == "scale":
        found = _numbers(key, value)
        return found[0] if len(found) == 1 else found
    if key == "importance" and "," in value:
        return tuple(value.split(","))
    if key == "bandwidth" and value not in ("anchor_spread", "dim"):
        return _numbers(key, value)[0]
    return value


def _numbers(key: str, text: str) -> list[float]:
    try:
        return [float(part) for part in str(text).split(",")]
    except ValueError:
        raise ValueError(f"--{key}={text!r}: give numbers separated by commas, such as 0.7,0.3.") from None
