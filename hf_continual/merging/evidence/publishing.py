"""A merge that is published: what can be known before it, and the push behind it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hf_continual.merging.errors import MergeError
from hf_continual.merging.evidence.report import license_of

if TYPE_CHECKING:
    from hf_continual.merging.engine.job import Job
    from hf_continual.merging.engine.options import Output


def check_push(job: Job, options: Output, kind: str) -> None:
    """Check that a push can succeed, before anything is computed and behind all checks that need no network.

    A repository that is missing is made, but in a dry run.

    Args:
        job: The merge.
        options: How the output is written.
        kind: ``"model"`` or ``"adapter"``.

    Raises:
        HubPushError: If it cannot.
        MergeError: If an adapter's base is not published, or the licences of the inputs differ and none was chosen.
        ValueError: If options of a push are given and no push.
    """
    _check_licences(job, options)
    if options.push_to_hub is not None and kind == "adapter":
        _check_base(job)
    if options.push_to_hub is not None:
        # Imported when asked for: a merge of folders needs no network code.
        from hf_continual.hub.preflight import preflight

        preflight(options.push_to_hub, private=options.private, token=options.token, create=not options.dry_run)
    elif options.private is not None or options.token is not None:
        given = f"private={options.private!r}" if options.private is not None else "token="
        raise ValueError(
            f"{given} says how to publish, and there is no push_to_hub=. Give the repository, or leave it out."
        )


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

    # Of merged adapters the base is the model they were put on; fused ones keep what their configuration names.
    named = None if job.base is None else job.base.hub_id or model_ref(job.base.folder).hub_id
    configs = [m.own.config for m in job.members if m.own.is_adapter]
    if named is None and model_ref(configs[-1].get("base_model_name_or_path")).hub_id is None:
        raise MergeError(
            f"the result is an adapter on {configs[-1].get('base_model_name_or_path')!r}, which is not published: nobody could "
            f"load it. {WAYS_OUT} Or give the published model as base=."
        )


def push(output_dir: Path, options: Output) -> str | None:
    """Push a finished merge, if that is asked for.

    Args:
        output_dir: The merge.
        options: How it was written.

    Returns:
        Page of the commit, or None.

    Raises:
        HubPushError: If it was not pushed; the merge is whole, and the message names the command that goes on.
    """
    if options.push_to_hub is None or options.dry_run:
        return None
    from hf_continual.hub.push import push_to_hub

    done = push_to_hub(
        output_dir, options.push_to_hub, private=options.private, token=options.token, license=options.license
    )
    return None if done is None else done.commit_url
