"""`make demo`: the same tasks learned in two ways side by side, and what was retained.

Two arms run as processes of one thread each; this process shows their progress, then the matrices, the changes,
and the plot, and checks that the trained model loads.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import AutoConfig
from transformers.utils import logging as hf_logging

from hf_continual.atomic_files import read_object
from hf_continual.demo.arm import TASKS, Settings
from hf_continual.hub.damaged import loading
from hf_continual.metrics import AccuracyMatrix
from hf_continual.plots import plot_forgetting

ARMS = {"sequential": "SFTTrainer", "continual": "ContinualTrainer"}


def main(
    model: str | None = None,
    out: Path = Path("demo-out"),
    seed: int = 0,
    fresh: bool = False,
    console: Console | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Run the demo.

    Args:
        model: Folder or Hub id; None is the embedded default, converted to a folder in the cache.
        out: Output folder. Finished work in it is not repeated.
        seed: Seed of people, order, adapters.
        fresh: Whether to start over in a folder that holds another run.
        console: Where progress and tables go; by default the standard output.
        **changes: Other fields of `Settings`.

    Returns:
        The measurements, as written to ``results.json``.

    Raises:
        ValueError: If the folder holds a run with other settings.
        RuntimeError: If an arm failed; quotes what it printed last.
    """
    console = console or Console()
    started = time.time()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    if fresh and (out / "settings.json").is_file():
        shutil.rmtree(out)
    if model is None:
        from hf_continual.demo.model import embedded_model

        with console.status("converting the embedded model, once"), contextlib.redirect_stderr(io.StringIO()):
            model = str(embedded_model())
    else:
        with loading(model, "the model"):
            AutoConfig.from_pretrained(model)  # fails here with one message, not in the two processes
    if "dtype" not in changes:
        changes["dtype"] = _dtype(out)
    settings = Settings(model=model, out=str(out), seed=seed, **changes)
    _keep_settings(out, settings)
    console.print(
        f"\n[bold]hf_continual demo[/]  {Path(model).name}; {len(TASKS)} tasks in a row: invented people and their "
        f"{', '.join(name for name, _ in TASKS)}.\nThe base model knows none of them. Both arms learn the same rows for "
        f"{settings.steps} steps each with LoRA in {settings.dtype}; [bold]continual[/] adds Replay + FreezeLayers + RecAdam.\n"
    )
    _run_arms(out, settings, console)
    results = {arm: read_object(out / arm / "results.json") for arm in ARMS}
    for arm in ARMS:
        console.print(_matrix_table(arm, results[arm]))
    console.print(_changes_table(results))
    console.print(
        f"One learning rate, {settings.learning_rate:g}, in both arms: a smaller one forgets less without any method. A plan with "
        f"baselines: {{learning_rates: [x, x/3, x/10]}} measures how much.",
        highlight=False, markup=False,
    )  # fmt: skip
    plot = _plot(out, results)
    trained = (out / "continual" / "model").resolve()
    answer = _ask(trained, settings)
    minutes = (time.time() - started) / 60
    summary = {"minutes": minutes, "settings": asdict(settings), **{a: _figures(results[a]) for a in ARMS}}
    (out / "results.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    console.print(f"\nloaded again with AutoModelForCausalLM, it answers:\n  [italic]{answer}[/]")
    console.print(
        f"\nforgetting curves  {plot}\ntrained model      {trained}\nall numbers        {out / 'results.json'}"
    )
    console.print(f"measured in this run, in {minutes:.1f} minutes.\n")
    return summary


def _dtype(out: Path) -> str:
    """The dtype of the run in the folder, else the faster one."""
    file = out / "settings.json"
    if file.is_file():
        return read_object(file).get("dtype", "bfloat16")
    from hf_continual.demo.model import fast_dtype

    return fast_dtype()


def _keep_settings(out: Path, settings: Settings) -> None:
    out.mkdir(parents=True, exist_ok=True)
    file = out / "settings.json"
    now = asdict(settings)
    then = {"dtype": _dtype(out), **read_object(file)} if file.is_file() else now
    if then != now:
        changed = ", ".join(f"{k}: {then.get(k)!r} -> {v!r}" for k, v in now.items() if then.get(k) != v)
        raise ValueError(
            f"{out} holds a demo with other settings ({changed}). Name another folder with --out, or start over with "
            f"--fresh."
        )
    file.write_text(json.dumps(now, indent=1), encoding="utf-8")


def _run_arms(out: Path, settings: Settings, console: Console) -> None:
    waiting = [arm for arm in ARMS if not (out / arm / "results.json").is_file()]
    if not waiting:
        console.print("both arms are finished already; --fresh trains again\n")
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    processes: dict[str, subprocess.Popen] = {}
    for arm in waiting:
        (out / arm).mkdir(exist_ok=True)
        with (out / arm / "log.txt").open("a", encoding="utf-8") as log:
            processes[arm] = subprocess.Popen(
                [sys.executable, "-m", "hf_continual.demo.arm", arm, str(out / "settings.json")],
                stdout=log, stderr=subprocess.STDOUT, env=environment,
            )  # fmt: skip
    try:
        _watch(out, settings, processes, console)
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.terminate()
            process.wait()


def _watch(out: Path, settings: Settings, processes: dict[str, subprocess.Popen], console: Console) -> None:
    """Show one bar per arm until both end."""
    steps = len(TASKS) * settings.steps
    columns = ("[bold]{task.description:<11}", "{task.fields[doing]:<34}")
    progress = Progress(
        *(TextColumn(column) for column in columns), BarColumn(24), TextColumn("{task.completed:>3.0f}/{task.total:.0f}"),
        TimeElapsedColumn(), TimeRemainingColumn(), console=console,
    )  # fmt: skip
    with progress:
        bars = {arm: progress.add_task(arm, total=steps, doing="starting") for arm in processes}
        running = dict(processes)
        while running:
            time.sleep(0.5)
            for arm, process in list(running.items()):
                code = process.poll()
                last = _last_line(out / arm / "progress.jsonl")
                progress.update(bars[arm], **_bar(last, settings))
                if code is not None:
                    del running[arm]
                    if code:
                        tail = (out / arm / "log.txt").read_text(encoding="utf-8").splitlines()[-15:]
                        raise RuntimeError(
                            f"The {arm} arm ended with exit code {code}. Its log ({out / arm / 'log.txt'}) ends:\n"
                            + "\n".join(tail)
                            + "\nRun the same command again to resume from the last checkpoint."
                        )


def _last_line(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    lines = file.read_text(encoding="utf-8").splitlines()
    try:
        return json.loads(lines[-1]) if lines else {}
    except ValueError:  # the line is being written
        return json.loads(lines[-2]) if len(lines) > 1 else {}


def _bar(last: dict[str, Any], settings: Settings) -> dict[str, Any]:
    task = last.get("task", 0)
    doing = last.get("doing")
    if doing is None and "loss" in last and task < len(TASKS):
        doing = f"{task + 1}. {TASKS[task][0]}, loss {last['loss']:.2f}"
    return {"completed": task * settings.steps + last.get("step", 0), "doing": doing or "starting"}


def _figures(results: dict[str, Any]) -> dict[str, Any]:
    base = [results["base"]["exact"][name]["value"] for name, _ in TASKS]
    matrix = AccuracyMatrix(results["matrix"], base)
    old = [results["nll"][name]["value"] for name, _ in TASKS[:-1]]
    return {
        "matrix": results["matrix"],
        "base": base,
        **matrix.summary,
        "old_tasks_exact": sum(v for v in results["matrix"][-1][:-1]) / len(old),
        "old_tasks_nll": sum(old) / len(old),
        "general_loss": results["general"]["value"],
        "general_loss_change": results["general"]["value"] - results["base"]["general"]["value"],
    }


def _matrix_table(arm: str, results: dict[str, Any]) -> Table:
    table = Table(
        title=f"{arm} ({ARMS[arm]}): exact match in %, n = {_rows(results)} per cell",
        title_justify="left",
        min_width=60,
    )
    table.add_column("after learning")
    for name, _ in TASKS:
        table.add_column(name, justify="right")
    table.add_row("(base model)", *(f"{100 * results['base']['exact'][n]['value']:.0f}" for n, _ in TASKS), style="dim")
    for (name, _), row in zip(TASKS, results["matrix"], strict=True):
        table.add_row(name, *("" if v is None else f"{100 * v:.0f}" for v in row))
    return table


def _rows(results: dict[str, Any]) -> int:
    return results["base"]["exact"][TASKS[0][0]]["n"]


def _changes_table(results: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="forgetting, side by side", title_justify="left")
    table.add_column("")
    for arm in ARMS:
        table.add_column(f"{arm}", justify="right")
    figures = {arm: _figures(results[arm]) for arm in ARMS}
    rows = (
        ("overall performance, all tasks (%)", "overall_performance", 100, ".0f"),
        ("old tasks, exact match at the end (%)", "old_tasks_exact", 100, ".0f"),
        ("backward transfer, BWT (points)", "backward_transfer", 100, "+.0f"),
        ("old tasks, answer loss (nats per token)", "old_tasks_nll", 1, ".2f"),
        ("general text, loss (nats per token)", "general_loss", 1, ".2f"),
        ("general text, change from the base model", "general_loss_change", 1, "+.2f"),
    )
    for label, key, factor, style in rows:
        table.add_row(label, *(format(factor * figures[arm][key], style) for arm in ARMS))
    return table


def _plot(out: Path, results: dict[str, dict[str, Any]]) -> Path:
    arms: dict[str, dict[str, list[tuple[float, float]]]] = {}
    general: dict[str, list[tuple[float, float]]] = {}
    for arm, title in ARMS.items():
        points = {}
        for line in (out / arm / "curves.jsonl").read_text(encoding="utf-8").splitlines():
            point = json.loads(line)
            points[point["at"]] = point  # a resumed task remeasures some points
        label = f"{arm} ({title})"
        base = results[arm]["base"]
        general[label] = [(0, base["general"]["value"]), *((x, p["general"]) for x, p in sorted(points.items()))]
        arms[label] = {}
        for i, (name, _) in enumerate(TASKS):
            begin = i * results[arm]["settings"]["steps"]
            curve = [(x, p["exact"][name]) for x, p in sorted(points.items()) if name in p["exact"]]
            arms[label][name] = [(begin, base["exact"][name]["value"]), *curve] if i == 0 else curve
    steps = results["continual"]["settings"]["steps"]
    figure = plot_forgetting(
        arms, [(i * steps, f"{i + 1}. learn {name}") for i, (name, _) in enumerate(TASKS)], general
    )
    path = (out / "forgetting.png").resolve()
    figure.savefig(path, dpi=150)
    return path


def _ask(folder: Path, settings: Settings) -> str:
    """Load the trained model as a user would, and ask it a question of the first task."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    row = settings.stream()[0].test[0]  # pyrefly: ignore[unsupported-operation]
    inputs = tokenizer(row["prompt"], return_tensors="pt")
    produced = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    answer = tokenizer.decode(produced[0], skip_special_tokens=True).replace("\n", " ")
    return f"{answer}   (learned first; correct:{row['completion']})"
