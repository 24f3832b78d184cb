"""Take in the pieces of a pack that have arrived: check each part, keep it, put files together. Standard library only.

python3 gpu/arrive.py WORK     # exit code 0: complete; 3: pieces are missing; 2: a part is damaged
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tarfile
from pathlib import Path

DAMAGED, MISSING = 2, 3


def digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def is_whole(file: Path, told: dict) -> bool:
    """Whether a file has the size and the checksum that the manifest states."""
    return file.is_file() and file.stat().st_size == told["size"] and digest(file) == told["sha256"]


def take(pack: Path, work: Path, told: dict) -> tuple[list[str], list[str]]:
    """Keep the parts of a file that have arrived, and put it together once all have.

    Args:
        pack: Folder of the pieces.
        work: Folder that stays between transfers.
        told: The file's entry in the manifest.

    Returns:
        Parts that are missing, and sentences about damaged ones.
    """
    target = work / "files" / told["name"]
    if is_whole(target, told):
        return [], []
    kept, missing, damaged = [], [], []
    for part in told["parts"]:
        here, place = pack / part["file"], work / "parts" / part["sha256"]
        if not is_whole(place, part) and here.is_file():
            if is_whole(here, part):
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(here, place)
            else:
                damaged.append(
                    f"{part['file']} has {here.stat().st_size} bytes and sha256 {digest(here)[:12]}, the manifest says "
                    f"{part['size']} and {part['sha256'][:12]}: copy it again."
                )
                continue
        (kept if place.is_file() else missing).append(place if place.is_file() else part["file"])
    if not missing and not damaged:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as whole:
            for place in kept:
                with place.open("rb") as opened:
                    shutil.copyfileobj(opened, whole)
        if not is_whole(target, told):
            damaged.append(
                f"{told['name']} put together from {len(kept)} parts has another checksum: build the pack again."
            )
        for place in kept:
            place.unlink()
    return missing, damaged


def unpack(work: Path, name: str) -> None:
    """Extract an archive next to the files, once for each content."""
    file, mark = work / "files" / f"{name}.tar.gz", work / f"{name}.sha256"
    if not file.is_file() or (mark.is_file() and mark.read_text() == digest(file)):
        return
    shutil.rmtree(work / name, ignore_errors=True)
    with tarfile.open(file) as opened:
        opened.extractall(work / name, filter="data")
    mark.write_text(digest(file))


def main() -> int:
    """Take in what has arrived, and state what is missing."""
    pack, work = Path(__file__).resolve().parents[1], Path(sys.argv[1]).resolve()
    manifest = json.loads((pack / "gpu" / "manifest.json").read_text(encoding="utf-8"))
    work.mkdir(parents=True, exist_ok=True)
    absent, wrong = set(), []
    for told in manifest["files"]:
        missing, damaged = take(pack, work, told)
        wrong += damaged
        if missing and not told["needed"]:
            print(f"{told['name']} has not arrived; it is optional.")
        elif missing:
            absent |= {m.split("/")[0] for m in missing}
    named = {told["name"] for told in manifest["files"]}
    for former in [p for p in (work / "files").rglob("*") if p.is_file()]:
        if former.relative_to(work / "files").as_posix() not in named:
            former.unlink()  # of an earlier pack: two versions of a wheel would stop its installation
    (work / "commit").write_text(manifest["commit"], encoding="utf-8")
    for line in wrong:
        print(line, file=sys.stderr)
    if wrong:
        return DAMAGED
    for name in ("project", "data"):
        unpack(work, name)
    if absent:
        print(f"kept what has arrived in {work}; missing: {', '.join(sorted(absent))}")
        return MISSING
    return 0


if __name__ == "__main__":
    sys.exit(main())
