"""Cost of a streamed fusion: memory against the plan's limit, and time against a plain average of the same files.

python tests/benchmarks/kif_fuse.py --gigabytes 0.5
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from safetensors.torch import save_file

from tests.merging.synthetic import Watch, anonymous

torch.set_num_threads(1)
SIZE = 4096 * 1024  # elements of a tensor
ROLES = ("base", "new", "old")


def make(folder: Path, tensors: int) -> None:
    """Three models in bfloat16 and the averages of both sides in float32."""
    g = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i}.w.weight" for i in range(tensors)]
    base = {n: torch.randn(SIZE, generator=g).view(4096, -1) for n in names}
    for role in ROLES:
        (folder / role).mkdir()
        moved = base if role == "base" else {n: t + 0.01 * torch.randn(t.shape, generator=g) for n, t in base.items()}
        save_file({n: t.bfloat16() for n, t in moved.items()}, folder / role / "model.safetensors")
        (folder / role / "config.json").write_text(json.dumps({"model_type": "x", "num_hidden_layers": tensors}))
    keys = [f"{side}.{k}/{n}" for side in ("inner", "outer") for k in ("importance", "uncertainty") for n in names]
    save_file({k: torch.rand(4096, SIZE // 4096, generator=g) for k in keys}, folder / "kif.safetensors")


def child(folder: Path, way: str, watched: bool) -> None:
    """One merge in its own process."""
    from hf_continual.merging import linear
    from hf_continual.merging.methods.kif import fuse as kif
    from hf_continual.plots import plot_sides

    # Drawn once before: what matplotlib loads is not a buffer of the fusion.
    plot_sides({"x": dict.fromkeys(("elements", "both", "new_only", "old_only", "neither"), 1)}).savefig(
        folder / "x.png"
    )

    base, new, old = (folder / r for r in ROLES)
    bounds: list[int] = []
    plan = kif.make_plan

    def noted(*given):
        made = plan(*given)
        bounds.append(made[0].memory)
        return made

    kif.make_plan = noted
    watch, before = Watch(), anonymous()
    if watched:  # in a separate run: watching takes CPU time
        watch.start()
    cpu, wall = time.process_time(), time.perf_counter()
    if way == "average":
        result = linear.merge_linear([base, new, old], folder / "out", overwrite=True)
    else:
        result = kif.kif_fuse(base, new, folder / "out", old=old, importance=folder / "kif.safetensors", overwrite=True)
    told = {
        "cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "read": result.bytes_read,
        "grown": watch.stop() - before if watched else 0, "bound": bounds[:1],
    }  # fmt: skip
    print(json.dumps(told))


def main() -> None:
    """Interleaved runs; medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=0.1, help="of each model")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--child", nargs=3)
    args = parser.parse_args()
    if args.child:
        child(Path(args.child[0]), args.child[1], args.child[2] == "watched")
        return
    with tempfile.TemporaryDirectory() as name:
        folder, tensors = Path(name), max(1, round(args.gigabytes * 1e9 / 2 / SIZE))
        make(folder, tensors)
        runs: dict[str, list[dict]] = {"average": [], "kif_fuse": []}
        held = {}
        for repeat in range(args.repeat + 1):
            for way, found in runs.items():
                done = subprocess.run(
                    [sys.executable, __file__, "--child", name, way, "timed" if repeat else "watched"],
                    capture_output=True,
                    text=True,
                    check=True,
                )
                told = json.loads(done.stdout.splitlines()[-1])
                if repeat:
                    found.append(told)
                else:
                    held[way] = told["grown"]
    middle = {w: sorted(found, key=lambda r: r["cpu"])[len(found) // 2] for w, found in runs.items()}
    for way, r in middle.items():
        bound = f", plan {r['bound'][0] / 2**20:.0f} MiB" if r["bound"] else ""
        print(
            f"{way}: {tensors * SIZE / 1e6:.0f} M elements, read {r['read'] / 1e9:.2f} GB, {r['cpu']:.1f} s of CPU "
            f"({r['wall']:.1f} s), memory grew by {held[way] / 2**20:.0f} MiB{bound}"
        )
    ratio = middle["kif_fuse"]["cpu"] / middle["average"]["cpu"]
    print(
        f"kif_fuse / average in CPU time: {ratio:.1f}, for {middle['kif_fuse']['read'] / middle['average']['read']:.1f} of the bytes"
    )


if __name__ == "__main__":
    main()
