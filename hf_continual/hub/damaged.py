"""Files that other tools wrote: a parser's error becomes a message that names the file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants
from safetensors import SafetensorError, safe_open

from hf_continual.atomic_files import DamagedFile, read_object
from hf_continual.paths import check_is_there
from hf_continual.tensors.weight_files import weight_map

# The required type of each file's JSON; the loader ignores other JSON in a folder.
OBJECTS = (
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "preprocessor_config.json",
    "processor_config.json",
)


@contextlib.contextmanager
def loading(source: str | os.PathLike[str], what: str, advice: str = "") -> Iterator[None]:
    """Turn a loader's errors into errors that name what was loaded, and the damaged file if there is one.

    Args:
        source: Folder or Hub id that is loaded.
        what: What is loaded, such as ``"the tokenizer"``.
        advice: What to do, as a sentence.

    Yields:
        None: While it is loaded.

    Raises:
        DamagedFile: If a file of the folder cannot be read, or holds values that the loader cannot use.
        FileNotFoundError: If `source` is neither a folder here nor a name known to the Hub or its cache.
    """
    check_is_there(source, what)
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, FileNotFoundError):
        raise
    except Exception as error:
        end = f" {advice}" if advice else ""
        if problem := first_damaged(Path(source)):
            raise DamagedFile(f"{what} cannot be loaded: {problem}{end}") from error
        if isinstance(error, OSError) and (missing := not_found(source, what, error)):
            raise FileNotFoundError(missing) from error
        if isinstance(error, OSError | ImportError) or type(error).__name__ == "OutOfMemoryError":
            raise
        said = str(error).strip().rstrip(".") or "no further details"
        raise DamagedFile(f"{what} of {source} cannot be loaded: {type(error).__name__}: {said}.{end}") from error


def not_found(source: str | os.PathLike[str], what: str, error: BaseException) -> str | None:
    """Explain a name that is not a folder, and that the Hub does not have or that could not be looked up.

    Args:
        source: What should be loaded.
        what: What it is, such as ``"the model"``.
        error: What the loader raised.

    Returns:
        A sentence; None if the error is about something else.
    """
    said = str(error)
    unreached = any(
        words in said for words in ("couldn't connect to", "cached files", "outgoing traffic", "offline mode")
    )
    unknown = any(words in said for words in ("is not a valid model identifier", "Repository Not Found"))
    if Path(source).expanduser().exists() or not (unreached or unknown):
        return None
    offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
    hub = (
        f"the Hub could not be reached{offline}, and its cache has nothing of that name"
        if unreached
        else "the Hub has no model of that name"
    )
    return (
        f"{what}: there is no folder {source} here (looked in {Path.cwd()}), and {hub}. Check the spelling; for a folder give its path, "
        f"for a model of the Hub 'namespace/name'{', with a network' if unreached else ' and, if it is private, a token: hf auth login'}."
    )


def first_damaged(folder: Path) -> str | None:
    """Find the first file of a model's folder that is damaged.

    Args:
        folder: A folder; nothing is found for a Hub id.

    Returns:
        A sentence with the file's path; None if all can be read.
    """
    if not folder.is_dir():
        return None
    for file in sorted(folder.iterdir()):
        try:
            if file.name in OBJECTS:
                read_object(file)
            elif file.name.endswith(".safetensors.index.json"):
                _check_index(file)
            elif file.suffix == ".safetensors":
                _check_whole(file)
        except (ValueError, OSError) as error:
            return str(error)
    return None


def _check_index(index: Path) -> None:
    for name in sorted(set(weight_map(index).values())):
        if not (index.parent / name).is_file():
            raise DamagedFile(f"{index} names {name}, which is not in the folder.")


def _check_whole(file: Path) -> None:
    try:
        with safe_open(file, "np"):
            pass
    except SafetensorError as error:
        size = file.stat().st_size
        raise DamagedFile(f"{file} has {size} bytes and is not a complete safetensors file ({error}).") from error
