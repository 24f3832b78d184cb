"""The record of a run's plan: the same plan resumes, a changed one is refused with the difference."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_continual.atomic_files import DamagedFile, checksum, read_checked, write_checked
from hf_continual.methods.base import Method
from hf_continual.methods.compose import kind_of
from hf_continual.plain import as_plain
from hf_continual.stream.models import local_adapter
from hf_continual.stream.past_rows import row_options
from hf_continual.stream.plan import JOINT
from hf_continual.stream.plan_lines import PlanError
from hf_continual.stream.prepare import fingerprint
from hf_continual.stream.prepared import Prepared
from hf_continual.stream.saved import saved_files

PLAN = "plan.json"

# Entries that may differ between two attempts without changing a result.
FREE = ("output_dir", "evaluation.batch_size", "evaluation.bootstrap", "evaluation.solved_at", "sweep")
SHOWN = re.compile(
    r"(^|\.)sft\.(disable_tqdm|max_minutes|enable_jit_checkpoint|log\w*|report_to|run_name|save_total_limit|dataloader_(num_workers|pin_memory))$|\.gere\.cache_dir$"
)


def plain_plan(prepared: Prepared) -> dict[str, Any]:
    """The plan as plain data; rows by their number and hash, so that a changed file is a changed plan."""
    plan = prepared.plan
    data = as_plain(plan.model_dump(exclude={"tasks", "sweep", "baselines", "output_dir", "max_minutes"}), _named)
    if (base := Path(plan.model.path)).is_dir():
        data["model"]["files"] = saved_files(base)
    if plan.model.adapter is not None:
        data["model"]["adapter_files"] = saved_files(local_adapter(plan.model.adapter))
    data["model"]["vocabulary"] = _vocabulary(prepared.tokenizer)
    data["methods"] = _with_rows(data["methods"])
    data["tasks"] = []
    for task, planned in zip(prepared.stream, plan.tasks, strict=True):
        entry = as_plain(planned.model_dump(exclude={"train", "test"}), _named)
        entry["methods"] = _with_rows(entry["methods"])
        for which, source, rows in (("train", planned.train, task.train), ("test", planned.test, task.test)):
            named = (
                source
                if isinstance(source, str)
                else as_plain(source, _named)
                if isinstance(source, Mapping)
                else "rows in Python"
            )
            entry[which] = None if rows is None else {"source": named, **(fingerprint(rows) or {})}
        data["tasks"].append(entry)
    if prepared.memory is not None and prepared.memory.start:
        data["memory"]["start"] = {"source": data["memory"]["start"], **(fingerprint(prepared.memory.start) or {})}
    for name, rows in prepared.gauges.items():
        data["evaluation"]["gauges"][name]["rows"] = fingerprint(rows)
    return data


def _vocabulary(tokenizer: Any) -> str:
    """A fingerprint of a tokenizer, wherever it was loaded from."""
    marks = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, getattr(tokenizer, "chat_template", None)]
    return checksum([sorted(tokenizer.get_vocab().items()), marks])


def _with_rows(methods: Any) -> Any:
    """Methods with a digest next to each path of rows: a file may move but must not change."""
    if isinstance(methods, list):
        return [_with_rows(method) for method in methods]
    if not isinstance(methods, dict):
        return methods
    found = {}
    for name, options in methods.items():
        found[name] = dict(options) if isinstance(options, dict) else options
        for option in row_options(name, options):
            if isinstance(path := options.get(option), str) and Path(path).expanduser().is_file():
                raw = Path(path).expanduser().read_bytes()
                found[name][option] = {"source": path, "sha256": hashlib.sha256(raw).hexdigest()[:16]}
    return found


def _named(value: Any) -> Any:
    """The plain representation of a value that is not plain data."""
    if isinstance(value, Method):
        return {kind_of(type(value)): value.describe()}
    return f"{value.__module__}:{value.__qualname__}" if callable(value) else repr(value)


def keep_plan(output_dir: Path, now: dict[str, Any]) -> None:
    """Write the plan of a new run, or compare it with the plan the folder was started with.

    Tasks added at the end are not a change: the run continues with them. To a joint run none can be added.

    Args:
        output_dir: The run's folder.
        now: The plan as plain data.

    Raises:
        PlanError: If it differs; shows the difference.
    """
    file = output_dir / PLAN
    if file.is_file():
        then = _recorded(file)
        if lines := [*differences(then, now), *_added(then, now)]:
            shown = "\n  ".join(lines[:12]) + (f"\n  and {len(lines) - 12} more" if len(lines) > 12 else "")
            raise PlanError(
                f"{output_dir} was started with another plan:\n  {shown}\nContinue with the original plan, which is in {file.name}, or give the "
                f"changed plan another output_dir. {ADDED[now.get('between_tasks') == JOINT]}"
            )
    elif output_dir.is_dir() and (found := sorted(p.name for p in output_dir.iterdir() if not _hidden(p.name))):
        if begun := [name for name in found if name.startswith("task-")]:
            raise PlanError(
                f"{file} is missing, but {output_dir} holds {', '.join(begun)}: the plan they were trained with is not "
                f"known. {_way_out(output_dir)}"
            )
        raise PlanError(
            f"{output_dir} is not empty, and it is not the folder of a plan's run. Choose another output_dir."
        )
    write_checked(file, now)


ADDED = (
    "Tasks may be added at the end.",
    "A joint run has all its rows from the first step on, so no task can be added.",
)


def _added(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Tasks added at the end, where they change what is trained already."""
    if now.get("between_tasks") != JOINT:
        return []
    before = len(then["tasks"])
    return [f"tasks[{i}]: added {_short(t)}" for i, t in enumerate(now["tasks"][before:], start=before)]


def _hidden(name: str) -> bool:
    """Locks, and unfinished files of a killed process."""
    return name.endswith(".lock") or (name.startswith(".") and name.endswith(".partial"))


def _recorded(file: Path) -> dict[str, Any]:
    try:
        return read_checked(file)
    except DamagedFile as error:
        raise PlanError(
            f"{error} It is the record of the plan that {file.parent} was started with; without it, nothing shows whether this "
            f"plan is the same. {_way_out(file.parent)}"
        ) from error


def _way_out(output_dir: Path) -> str:
    return (
        f"Restore {PLAN} from a copy; or choose another output_dir; or delete {output_dir}, and the same command trains all "
        f"tasks again."
    )


def differences(then: Any, now: Any, path: str = "") -> list[str]:
    """Every entry that differs, as ``path: old -> new``; tasks added at the end are left out."""
    if path in FREE or SHOWN.search(path):
        return []
    if path in ("model.files", "model.vocabulary") and then is None:
        return []  # the record of a version that did not store them
    if isinstance(then, str) and isinstance(now, dict) and now.get("source") == then:
        return []
    if isinstance(then, dict) and isinstance(now, dict):
        if _is_the_same(then, now, path):
            return []
        lines = []
        for key in [*then, *(k for k in now if k not in then)]:
            inner = f"{path}.{key}" if path else str(key)
            lines += differences(then.get(key), now.get(key), inner)
        return lines
    if isinstance(then, list) and isinstance(now, list) and (path == "tasks" or len(then) == len(now)):
        lines = [f"{path}[{i}]: {_short(t)} -> removed" for i, t in enumerate(then[len(now) :], start=len(now))]
        for i, (a, b) in enumerate(zip(then, now, strict=False)):
            lines += differences(a, b, f"{path}[{i}]")
        return lines
    return [] if then == now else [f"{path}: {_short(then)} -> {_short(now)}"]


def _is_the_same(then: dict[str, Any], now: dict[str, Any], path: str) -> bool:
    """Whether files were only moved, judged by their content."""
    if path == "model" and then.get("files") is not None and then["files"] == now.get("files"):
        places = ("path", "tokenizer", "adapter")
        return {k: v for k, v in then.items() if k not in places} == {k: v for k, v in now.items() if k not in places}
    if "sha256" in then and "sha256" in now:
        return {k: v for k, v in then.items() if k != "source"} == {k: v for k, v in now.items() if k != "source"}
    return False


def _short(value: Any) -> str:
    text = repr(value["name"] if isinstance(value, dict) and "name" in value else value)
    return text if len(text) < 80 else text[:77] + "..."


@contextlib.contextmanager
def only_one(output_dir: Path) -> Iterator[None]:
    """Refuse a second process that would write the same run; a killed one leaves no stale lock.

    Args:
        output_dir: The run's folder.

    Yields:
        None: While this process owns it.

    Raises:
        PlanError: If another process is running it.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise PlanError(
            f"{output_dir} is being run by another process. Wait for it, or choose another output_dir."
        ) from None
    try:
        yield
    finally:
        lock.release()
