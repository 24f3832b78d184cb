"""Plans that start from an adapter: its base, and what happens to it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from accelerate import PartialState
from filelock import FileLock
from peft import PeftConfig
from transformers.utils.peft_utils import find_adapter_config_file

from hf_continual.notice import notice
from hf_continual.stream.check_plan import bring_modules
from hf_continual.stream.models import load_base, local_adapter, new_adapter
from hf_continual.stream.plan import Plan
from hf_continual.stream.plan_lines import Where
from hf_continual.trainer.adapters import MERGE, MERGED, choose_way, consequence, merge_into_base

logger = logging.getLogger(__name__)

__all__ = ["from_merged", "said_of_start", "split_adapter"]


def split_adapter(plan: Plan, where: Where) -> Plan:
    """Split a model that is an adapter into its base and the adapter.

    Args:
        plan: As read.
        where: Places of its entries.

    Returns:
        The plan with `ModelPlan.path`, `adapter` and `from_adapter` filled in; unchanged for a full model.

    Raises:
        PlanError: If the adapter does not record its base, or cannot be used as requested.
    """
    model = plan.model
    source = model.adapter or model.path
    if find_adapter_config_file(source, revision=None if model.adapter else model.revision) is None:
        if model.adapter or model.from_adapter:
            raise where.error(
                ("model",), f"{source} does not hold an adapter (there is no adapter_config.json), but the plan has "
                f"{'adapter' if model.adapter else 'from_adapter'}. Leave that out, or give the adapter's folder."
            )  # fmt: skip
        return plan
    config = PeftConfig.from_pretrained(str(local_adapter(source, model.revision)))
    base = model.path if model.adapter else config.base_model_name_or_path
    if base is None:
        raise where.error(
            ("model",), f"{source} does not record its base. Give both: model: {{path: BASE, adapter: {source}}}."
        )
    try:
        brings = model.from_adapter == MERGE and bring_modules(plan)
        way = choose_way(model.from_adapter, source, {} if brings else plan.peft)
    except ValueError as error:
        raise where.error(("model",), str(error)) from None
    if plan.merge is not None and way != MERGE:
        raise where.error(
            ("between_tasks",), f"a merge between tasks puts models onto the base, but this plan starts from the adapter {source}. Write "
            f"model: {{path: {source}, from_adapter: {MERGE}}}, or leave the merge out."
        )  # fmt: skip
    folder = local_adapter(source, model.revision)
    tokenizer = model.tokenizer or (str(folder) if any(folder.glob("tokenizer*")) else None)
    named = source if model.revision is None or Path(source).is_dir() else str(folder)
    split = {"path": str(base), "adapter": named, "from_adapter": way, "tokenizer": tokenizer}
    if not model.adapter:
        split["revision"] = config.revision
    return plan.model_copy(update={"model": model.model_copy(update=split)})


def said_of_start(plan: Plan) -> str | None:
    """Describe what a plan does with the adapter that it starts from; None if it starts from a full model."""
    model = plan.model
    if model.adapter is None or model.from_adapter is None:
        return None
    config = PeftConfig.from_pretrained(str(local_adapter(model.adapter)))
    config.base_model_name_or_path = model.path
    return consequence(
        model.from_adapter, model.adapter, config, new_adapter(plan), str(Path(plan.output_dir) / MERGED)
    )


def from_merged(plan: Plan, output_dir: Path, tokenizer: Any) -> Plan:
    """Log what happens to the adapter, and merge it into its base if requested.

    Args:
        plan: As prepared.
        output_dir: The run's folder, where the merged base is kept.
        tokenizer: Saved with it.

    Returns:
        The plan, with the merged base as its model if there is one.
    """
    if (sentence := said_of_start(plan)) is None:
        return plan
    notice(logger, sentence)
    if plan.model.from_adapter != MERGE or plan.model.adapter is None:
        return plan
    target = output_dir / MERGED
    if PartialState().is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(output_dir / ".merged.lock"):  # the runs of a sweep share it
            if not target.is_dir():
                merge_into_base(load_base(plan.model), local_adapter(plan.model.adapter), target, tokenizer)
    PartialState().wait_for_everyone()
    update = {"path": str(target), "revision": None, "adapter": None, "from_adapter": None}
    return plan.model_copy(update={"model": plan.model.model_copy(update=update)})
