"""Publish a merge: the checks before it, and the push after it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hf_continual.merging.errors import MergeError
from hf_continual.merging.evidence.report import license_of

if TYPE_CHECKING:
    from hf_continual.merging.engine.job import Job
    from hf_continual.merging.engine.options import Output


def check_push(job: Job, options: Output, kind: str) -> None:
    """Check that a push can succeed, before anything is computed and after all checks that need no network.

    A missing repository is created, except in a dry run.

    Args:
        job: The merge.
        options: How the output is written.
        kind: ``"model"`` or ``"adapter"``.

    Raises:
        HubPushError: If the push cannot succeed.
        MergeError: If an adapter's base is not published, or the licences of the inputs differ and none was chosen.
        ValueError: If push options are given without a push.
    """
    _check_licences(job, options)
    if options.push_to_hub is not None and kind == "adapter":
        _check_base(job)
    if options.push_to_hub is not None:
        # Imported only here: a merge of folders needs no network code.
        from hf_continual.hub.preflight import preflight

        preflight(options.push_to_hub, private=options.private, token=options.token, create=not options.dry_run)
    elif options.private is not None or options.token is not None:
        given = f"private={options.private!r}" if options.private is not None else "token="
        raise ValueError(f"{given} applies only with push_to_hub=. Give the repository, or leave it out.")


def _check_licences(job: Job, options: Output) -> None:
    if options.push_to_hub is None or options.license is not None:
        return
    from hf_continual.hub.licences import License, LicenseConflict, inherit, unique

    inputs = [m.own for m in job.members] + ([] if job.base is None else [job.base])
    stated = [(c.name, license_of(c.folder)) for c in inputs]
    try:
        inherit(unique((name, None if found is None else License(found)) for name, found in stated))
    except LicenseConflict as error:
        raise MergeError(f"the merge is to be published, and {error}") from error


def _check_base(job: Job) -> None:
    from hf_continual.hub.adapters import WAYS_OUT
    from hf_continual.hub.refs import model_ref

    # The base of merged adapters is the model that they were applied to; fused ones keep what their configuration names.
    named = None if job.base is None else job.base.hub_id or model_ref(job.base.folder).hub_id
    configs = [m.own.config for m in job.members if m.own.is_adapter]
    if named is None and model_ref(configs[-1].get("base_model_name_or_path")).hub_id is None:
        raise MergeError(
            f"the result is an adapter on {configs[-1].get('base_model_name_or_path')!r}, which is not published: no one could "
            f"load it. {WAYS_OUT} Or give the published model as base=."
        )


def push(output_dir: Path, options: Output) -> str | None:
    """Push a finished merge, if that was requested.

    Args:
        output_dir: The merge.
        options: How it was written.

    Returns:
        Page of the commit, or None.

    Raises:
        HubPushError: If it was not pushed; the merge is complete, and the message names the command to resume.
    """
    if options.push_to_hub is None or options.dry_run:
        return None
    from hf_continual.hub.push import push_to_hub

    done = push_to_hub(
        output_dir, options.push_to_hub, private=options.private, token=options.token, license=options.license
    )
    return None if done is None else done.commit_url
