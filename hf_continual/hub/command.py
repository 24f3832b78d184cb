"""`hf-continual card` and `hf-continual push`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hf_continual.hub.errors import HubPushError

PUSH_FAILED = 3

card = typer.Typer(help="Model cards: check one, or write it from the facts in a folder.", no_args_is_help=True)


@card.command(epilog="Example: hf-continual card check out/law")
def check(
    folder: Annotated[Path, typer.Argument(help="Folder with a README.md, or a card.")],
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing; the exit code says it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check a card, and its numbers against the folder, without the network. Exit code 0 if clean, 2 with findings."""
    from hf_continual.hub.facts import CONFIG, RESULTS
    from hf_continual.hub.lint import lint_card, lint_folder

    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist.")
    alone = folder.is_file()
    found = lint_card(folder.read_text(encoding="utf-8", errors="replace")) if alone else lint_folder(folder)
    console = Console(highlight=False, soft_wrap=True, markup=False, quiet=quiet or as_json)
    if as_json:
        sys.stdout.write(json.dumps({"clean": not found, "findings": [str(f) for f in found]}, indent=1) + "\n")
    for finding in found:
        console.print(str(finding))
    unchecked = ""
    if alone:
        unchecked = "; its images, links and numbers were not checked: give the folder for that"
    elif not any((folder / name).is_file() for name in (CONFIG, RESULTS)):
        unchecked = f"; its numbers were not checked: there is no {RESULTS}"
    console.print((f"{len(found)} finding{'s' * (len(found) != 1)}" if found else "clean") + unchecked)
    raise typer.Exit(2 if found else 0)


@card.command(epilog="Example: hf-continual card render out/law --repo-id me/law")
def render(
    folder: Annotated[Path, typer.Argument(help="Folder with continual_config.json.")],
    repo_id: Annotated[str | None, typer.Option(help="Where the model is, or will be, published.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the card's path as JSON.")] = False,
) -> None:
    """Render the card of a folder again; the author's text in it is kept."""
    from dataclasses import replace

    from hf_continual.hub.files import write_card
    from hf_continual.hub.folder_facts import read_facts

    facts = read_facts(folder)
    write_card(folder, facts if repo_id is None else replace(facts, repo_id=repo_id))
    if as_json:
        sys.stdout.write(json.dumps({"card": str(folder / "README.md")}) + "\n")
    elif not quiet:
        Console(highlight=False, soft_wrap=True).print(str(folder / "README.md"))


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a model or adapter.")],
    repo_id: Annotated[str, typer.Argument(help="Repository: name, or namespace/name.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Whether a new repository is private.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; created if it does not exist.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    tag: Annotated[str | None, typer.Option(help="Name for the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Run every check and send nothing.")] = False,
    license: Annotated[str | None, typer.Option(help="Licence id, needed if the parents' licences differ.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the base model, if the folder has only a path.")
    ] = None,
    method_state: Annotated[
        bool,
        typer.Option("--method-state/--no-method-state", help="Whether to push the methods' state with the model."),
    ] = True,
    include: Annotated[
        list[str] | None, typer.Option(help="An additional file, by its path in the folder, such as rows of data.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars, and only the commit's page.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was pushed as JSON.")] = False,
) -> None:
    """Publish a folder in one commit; called again, it resumes where it stopped. Exit code 3 if it was not pushed."""
    from hf_continual.hub.push import push_to_hub

    console = Console(highlight=False, soft_wrap=True, markup=False)
    if quiet:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    try:
        done = push_to_hub(
            folder, repo_id, private=private, revision=revision, create_pr=create_pr, tag=tag, dry_run=dry_run,
            license=license, base_model=base_model, method_state=method_state, include=include or (),
        )  # fmt: skip
    except HubPushError as error:
        Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(f"HubPushError: {error}")
        sys.exit(PUSH_FAILED)
    if done is None:
        return
    if as_json:
        sys.stdout.write(json.dumps(asdict(done), indent=1) + "\n")
        return
    if quiet:
        sys.stdout.write(f"{done.pr_url or done.commit_url or done.repo_id}\n")
        return
    console.print(
        f"{len(done.files)} files, {done.size:,} bytes{', not pushed: ' + ', '.join(done.left_out) if done.left_out else ''}"
    )
    if done.oid is None:
        console.print(f"dry run: {done.repo_id} can be pushed to; nothing was sent")
    else:
        console.print(f"{'pushed' if done.new else 'already there'}: {done.pr_url or done.commit_url}")
