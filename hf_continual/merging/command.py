"""`hf-continual merge METHOD`: one command for all merges, a summary at the end.

The options of a method are the fields of its dataclass. The command therefore finds the method's name among the arguments
first, then parses them with the options of every merge and those of this method.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_continual.merging.by_name import METHODS, read_set, refuse_option, run_file, run_merge
from hf_continual.merging.config_file import read_merge_file
from hf_continual.merging.method_options import MethodOption, options_of
from hf_continual.merging.methods.table import merge_class

__all__ = ["METHODS", "merge", "run_merge"]

# Output options that are passed on unchanged.
_WRITTEN = (
    "output", "adapter_rank", "dtype", "max_shard_size", "vocab", "overwrite", "dry_run", "push_to_hub", "private", "license",
)  # fmt: skip

_output, _publish = (partial(typer.Option, rich_help_panel=panel) for panel in ("Output", "Publishing"))


def merge(ctx: typer.Context) -> None:
    """Merge checkpoints into one, a chunk at a time: no model is ever loaded whole."""
    words = list(ctx.args)
    method = method_among(words)
    known = {} if method is None else options_of(method)
    _check_options(words, method, known)
    command_for(method, known).main(args=words, prog_name=ctx.command_path, standalone_mode=False)


def _told(
    method: Annotated[
        str | None, typer.Argument(help=f"One of {', '.join(METHODS)}; or your own, package.module:Class.")
    ] = None,
    models: Annotated[
        list[str] | None, typer.Argument(help="Folders or Hub ids (id@revision), models or adapters, oldest first.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder; complete or absent.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with these names as keys, or a mergekit config.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Set a method option, NAME=VALUE, such as density=0.1.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The full model below the adapters, or before fine-tuning.")] = None,
    output: Annotated[str | None, _output(help="model or adapter; by default an adapter if that is exact.")] = None,
    adapter_rank: Annotated[
        int | None, _output(help="Rank of an adapter output; the default keeps the exact sum.")
    ] = None,
    dtype: Annotated[str | None, _output(help="float32, bfloat16 or float16; by default the first model's.")] = None,
    max_shard_size: Annotated[str | None, _output(help="Largest size of a weight file, such as 5GB.")] = None,
    vocab: Annotated[
        str | None, _output(help="strict, or extend for vocabularies that continue a shorter one.")
    ] = None,
    overwrite: Annotated[bool, _output("--overwrite", help="Replace the output once the new one is complete.")] = False,
    fresh: Annotated[bool, _output("--fresh", help="Start over instead of resuming an interrupted merge.")] = False,
    dry_run: Annotated[bool, _output("--dry-run", help="Run every check, print the plan, write nothing.")] = False,
    quantized_base: Annotated[
        str | None,
        _output(help="Base for adapters trained on a 4- or 8-bit base: original, dequantize, error, or a JSON config."),
    ] = None,
    push_to_hub: Annotated[str | None, _publish(help="Hub id to push the result to.")] = None,
    private: Annotated[bool | None, _publish("--private/--public", help="Whether a new repository is private.")] = None,
    license: Annotated[str | None, _publish(help="Licence id, needed if the inputs' licences differ.")] = None,
    quiet: Annotated[bool, _output("--quiet", help="No progress bar and no log.")] = False,
    as_json: Annotated[bool, _output("--json", help="Print what came out as JSON.")] = False,
) -> None:
    """Declare the options of every merge, for Typer."""


def _run(told: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
    """Run the command, given the arguments of every merge and the options of the method."""
    written = {name: told[name] for name in _WRITTEN} | {
        "resume": not told["fresh"],
        "progress": False if told["quiet"] else None,
        "quantized_base": _choice(told["quantized_base"]),
    }
    level = logging.WARNING if told["quiet"] else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    for other in ("httpx", "huggingface_hub", "matplotlib", "bitsandbytes"):
        logging.getLogger(other).setLevel(logging.ERROR)
    method, models, out, base = told["method"], told["models"], told["out"], told["base"]
    given = {**chosen, **read_set(told["set_"])}
    if told["config"] is not None:
        run_file(told["config"], method, models, out, base, given, written, told["as_json"])
        return
    if method is None or not models or out is None:
        raise ValueError("a merge needs METHOD, MODELS and --out; or --config FILE.")
    run_merge(method, models, out, base, given, written, told["as_json"])


@cache
def _shared() -> dict[str, bool]:
    """Every spelling of the options of every merge, and whether a value follows it."""
    options = [p for p in command_for(None, {}).params if p.param_type_name == "option"]
    return {"--help": False} | {w: not p.is_flag for p in options for w in (*p.opts, *p.secondary_opts)}


def method_among(words: Sequence[str]) -> str | None:
    """Find the method that a command names, itself or in its file.

    Args:
        words: The command's arguments.

    Returns:
        Its name; if no word is a method, the first word that is not an option, or None.

    Raises:
        FileNotFoundError: If the file is not there.
        MergeError: If it cannot be read.
    """
    names, file, rest, before = [], None, iter(words), ""
    for word in rest:
        option, sign, value = word.partition("=")
        if option == "--config":
            file = value if sign else next(rest, None)
        elif _shared().get(option) and not sign:
            next(rest, None)
        elif not word.startswith("-"):
            names.append((word, before not in _shared() and before.startswith("--") and "=" not in before))
        before = word
    if file is not None:
        return read_merge_file(Path(file)).method
    known = next((name for name, _ in names if name.replace("_", "-") in METHODS or _is_class(name)), None)
    # A word after an option that only its method knows may be the option's value.
    return known or next((name for name, is_value in names if not is_value), None)


def _is_class(word: str) -> bool:
    module, sign, name = word.partition(":")
    return bool(sign) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def _check_options(words: Sequence[str], method: str | None, known: Mapping[str, MethodOption]) -> None:
    """Refuse an option that neither every merge nor this method has."""
    spelled = {*_shared(), *(word for option in known.values() for word in (*option.spellings, *option.flags))}
    for word in words:
        option = word.partition("=")[0]
        if option.startswith("--") and len(option) > 2 and option not in spelled:
            refuse_option(option, method, known, _shared())


_EXAMPLE = "Example: hf-continual merge {} law tax{} --out merged"


_BASE = " --base Qwen/Qwen2.5-0.5B"


def _about(method: str | None) -> tuple[str | None, str | None]:
    """Help text above and below the options."""
    if method is None:
        return (
            merge.__doc__,
            f"hf-continual merge METHOD --help shows the options of a method. {_EXAMPLE.format('ties', _BASE)}",
        )
    cls = merge_class(method)
    source = cls.paper.title if cls.paper.url is None else f"{cls.paper.title}: {cls.paper.url}"
    example = _EXAMPLE.format(method, _BASE if cls.from_base else "")
    return inspect.cleandoc(cls.__doc__ or "").partition("\n")[0], f"{source}. {example}"


def command_for(method: str | None, known: Mapping[str, MethodOption]) -> Any:
    """The command with the options that every merge has, and those of a method.

    Args:
        method: Name of the method, or None.
        known: Its options.

    Returns:
        A command of Typer's.
    """
    app = typer.Typer(add_completion=False)
    about, more = _about(method)
    app.command(help=about, epilog=more)(_with_options(method, known))
    return typer.main.get_command(app)


def _with_options(method: str | None, known: Mapping[str, MethodOption]) -> Callable[..., None]:
    """Build the command with the options of a method."""
    common = list(inspect.signature(_told, eval_str=True).parameters.values())
    panel = f"Options of {method}"
    own, flags = [], {}
    for option in known.values():
        if option.name in {p.name for p in common}:
            continue  # can only be given with --set
        text = option.help + (" On the command line, a .jsonl or .txt file." if option.rows else "")
        told = typer.Option(
            "/".join(option.spellings), help=text, rich_help_panel=panel, metavar=option.metavar,
            show_default=option.default or False,
        )  # fmt: skip
        own.append((option.name, option.type, told))
        for word, value in option.flags.items():
            flags[name := word.strip("-").replace("-", "_")] = (option.name, value)
            own.append((name, bool, typer.Option(word, help=f"{option.spelling} {value}.", rich_help_panel=panel)))

    def command(**arguments: Any) -> None:
        for name, (option, value) in flags.items():
            if arguments.pop(name):
                arguments[option] = value
        shared = {p.name: arguments.pop(p.name) for p in common}
        _run(shared, {k: v for k, v in arguments.items() if v is not None})

    only = inspect.Parameter.KEYWORD_ONLY
    shown = [inspect.Parameter(n, only, default=None, annotation=Annotated[kind | None, told]) for n, kind, told in own]
    common = [p.replace(kind=only) for p in common]
    first = [p.name for p in common].index("output")
    parameters = [*common[:first], *shown, *common[first:]]
    command.__signature__ = inspect.Signature(parameters)  # pyrefly: ignore[missing-attribute]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _choice(quantized_base: str | None) -> Any:
    if quantized_base is None or not quantized_base.lstrip().startswith("{"):
        return quantized_base
    try:
        return json.loads(quantized_base)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"--quantized-base {quantized_base!r} is not valid JSON: {error}. Write for example "
            '--quantized-base \'{"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}\'.'
        ) from None
