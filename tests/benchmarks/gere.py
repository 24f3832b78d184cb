"""GeRe's cost: a step against SFTTrainer's on the same rows, the offline pass, the loss against a naive implementation, storage.

    python tests/benchmarks/gere.py [MODEL] [--dtype float32]

MODEL is a folder or Hub id; by default the embedded SmolLM2-135M with LoRA in bfloat16. One thread.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).parents[2]))

import datasets
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from hf_continual import ContinualTrainer, GeRe
from hf_continual.data.biography import biography_rows
from hf_continual.methods.gere import tm_loss
from hf_continual.methods.gere.states import record
from hf_continual.methods.gere.ternary import activation_states, unpack_states
from hf_continual.tensors.reference import last_hidden
from hf_continual.trainer import hand_over

STEPS, PAIRS, LENGTH = 3, 4, 96


def trainer(kind: str, path: str, folder: str, rows: Dataset, general: Dataset, dtype: torch.dtype) -> SFTTrainer:
    """The same tokens per step: 6 + 2 rows with GeRe, 8 rows without."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    settings = {
        "output_dir": folder, "per_device_train_batch_size": 8 if kind == "sft" else 6, "max_steps": STEPS, "bf16": False,
        "use_cpu": True, "report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        "gradient_checkpointing": False, "max_length": LENGTH,
    }  # fmt: skip
    common = {
        "model": model, "args": SFTConfig(**settings), "train_dataset": rows,
        "processing_class": AutoTokenizer.from_pretrained(path), "peft_config": LoraConfig(r=8, target_modules="all-linear"),
    }  # fmt: skip
    if kind == "sft":
        made = SFTTrainer(**common)
    else:
        method = GeRe(general, per_batch=2, max_length=LENGTH, weight="dynamic", cache_dir=folder)
        made = ContinualTrainer(**common, methods=[method])
    made.remove_callback(PrinterCallback)
    return made


def of_length(texts: list[str], tokenizer, length: int) -> Dataset:
    """Texts of exactly `length` tokens, two joined and cut: rows that need no padding on either side."""
    long = [" ".join(pair) for pair in zip(texts[::2], texts[1::2], strict=False)]
    cut = [tokenizer.decode(tokenizer(t)["input_ids"][:length]) for t in long]
    rows = [{"text": t} for t in cut if len(tokenizer(t)["input_ids"]) == length]
    if len(rows) < 32:
        raise SystemExit(f"Only {len(rows)} texts of {length} tokens: a batch of 8 would not be full.")
    return Dataset.from_list(rows)


def seconds(call) -> float:
    """Seconds of processor time of a call: one thread, and other processes do not count."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def bytes_for_backward(made: SFTTrainer) -> int:
    """Memory held by the graph of one micro-batch, each storage counted once."""
    storages: dict[int, int] = {}
    step = made.training_step

    def counted(*args, **kwargs):
        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            return step(*args, **kwargs)

    made.training_step = counted
    made.args.max_steps = 1
    made.train()
    weights = {p.untyped_storage().data_ptr() for p in made.model.parameters()}
    return sum(n for pointer, n in storages.items() if pointer not in weights)


def naive(hidden, reference, low, high, mask):
    """The loss written naively: fp32 states, every temporary kept."""
    z, h = hidden.float(), reference.float()
    negative, positive = h <= low, h >= high
    neutral = ~negative & ~positive
    loss = (
        negative * torch.relu(z - low)
        + neutral * (torch.relu(z - high) + torch.relu(low - z))
        + positive * torch.relu(high - z)
    )
    loss = loss * mask[..., None]
    return loss.sum() / ((loss != 0).sum() + 1e-8)


def flips(path: str, texts: list[str], tokenizer) -> None:
    """Units that cross a threshold only because of the batch's shape, at identical weights."""
    tokens = [tokenizer(t)["input_ids"][: 20 + 7 * (i % 11)] for i, t in enumerate(texts[:64])]
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            made = record(Path(folder) / "x.safetensors", {}, tokens, partial(last_hidden, model), 1.0)
            distances = {"padded": [], "flattened": []}
            for start in range(0, len(tokens), 8):
                batch = tokens[start : start + 8]
                states = [
                    unpack_states(made.row(start + i, len(ids)), made.low_D.numel()) for i, ids in enumerate(batch)
                ]
                width = max(map(len, batch))
                ids = torch.tensor([b + [tokenizer.eos_token_id] * (width - len(b)) for b in batch])
                mask = torch.tensor([[1] * len(b) + [0] * (width - len(b)) for b in batch])
                padded = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                flat = model.model(
                    input_ids=torch.tensor([[token for row in batch for token in row]]), use_cache=False,
                    position_ids=torch.tensor([[p for b in batch for p in range(len(b))]]),
                ).last_hidden_state[0]  # fmt: skip
                for i, s in enumerate(states):
                    before = sum(map(len, batch[:i]))
                    for kind, z in (("padded", padded[i, : len(s)]), ("flattened", flat[before : before + len(s)])):
                        distances[kind].append(outside(z.float(), s, made.low_D, made.high_D).flatten())
            for kind, found in distances.items():
                all_of = torch.cat(found)
                moved = all_of[all_of > 0]
                shown = [f"{float(moved.quantile(q)):.2g}" for q in (0.5, 0.9, 0.99, 1.0)] if len(moved) else "none"
                width = float((made.high_D - made.low_D).median()) / 2
                print(
                    f"flips at identical weights, {dtype}, {kind}: {len(moved)} of {len(all_of)} units, "
                    f"by (median, 90 %, 99 %, most) {shown}; a channel's deviation is {width:.2g} (median)"
                )


def outside(z, states, low, high):
    """Distance of each unit from its interval."""
    upper = torch.where(states < 0, low, torch.where(states > 0, torch.inf, high))
    lower = torch.where(states > 0, high, torch.where(states < 0, -torch.inf, low))
    return torch.relu(z - upper) + torch.relu(lower - z)


def loss_against_naive() -> None:
    """Time and memory of the loss and its backward."""
    hidden = torch.randn(4, 512, 2048, requires_grad=True)
    reference = hidden.detach() + 0.1 * torch.randn_like(hidden)
    low, high, mask = torch.full((2048,), -1.0), torch.full((2048,), 1.0), torch.ones(4, 512)
    states = activation_states(reference, low, high)
    ways = {
        "naive": lambda: naive(hidden, reference, low, high, mask),
        "ours": lambda: tm_loss(hidden, states, low, high, mask),
    }
    times = {}
    for name, way in ways.items():
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=saved: s.append(t.numel() * t.element_size()) or t, lambda t: t
        ):
            way()
        times[name] = (min(seconds(lambda w=way: w().backward()) for _ in range(5)), sum(saved))
    slow, fast = times["naive"], times["ours"]
    print(
        f"loss and its backward, naive / ours: time {slow[0] / fast[0]:.2f}, bytes kept for backward {slow[1] / fast[1]:.1f}"
    )


def construction(path: str, folder: str, rows: Dataset, general: Dataset, dtype: torch.dtype) -> None:
    """Building a trainer with GeRe against building SFTTrainer and having it read the general rows."""
    thousand = Dataset.from_list([general[i % len(general)] for i in range(1000)])
    ratios: list[float] = []
    for _ in range(8):
        made: list[SFTTrainer] = []
        sft = seconds(lambda: made.append(trainer("sft", path, folder, rows, thousand, dtype)))
        t = made[0]
        reading = seconds(lambda t=t: t._prepare_dataset(thousand, t.processing_class, t.args, False, None, "general"))
        ratios.append(seconds(lambda: trainer("gere", path, folder, rows, thousand, dtype)) / (sft + reading))
    ratios = sorted(ratios[1:])
    print(
        f"construction, GeRe with 1,000 rows / SFTTrainer and reading them: {statistics.median(ratios):.3f} "
        f"({ratios[0]:.3f} to {ratios[-1]:.3f})"
    )


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--dtype", default="bfloat16", help="float32 where the processor does not compute in bfloat16")
    parser.add_argument("--no-flips", action="store_true")
    parser.add_argument("--construction", action="store_true", help="only that")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    torch.set_num_threads(1)
    sys.stdout.reconfigure(line_buffering=True)
    datasets.disable_progress_bars()
    if args.model is None:
        from hf_continual.demo.model import embedded_model

        args.model = str(embedded_model())
    texts = biography_rows(200, "texts", versions=2)["text"]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = of_length(texts, tokenizer, LENGTH - 1)  # an end token is added to these
    general = of_length(texts, tokenizer, LENGTH)
    if not args.construction:
        loss_against_naive()
    with tempfile.TemporaryDirectory() as folder:
        construction(args.model, folder, rows, general, dtype)
        if args.construction:
            return
        kept = [bytes_for_backward(trainer(kind, args.model, folder, rows, general, dtype)) for kind in ("sft", "gere")]
        print(f"bytes kept for backward by a step, GeRe / SFTTrainer, same tokens: {kept[1] / kept[0]:.3f}")
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
        tokens = [tokenizer(t)["input_ids"][:LENGTH] for t in rows["text"]][:40]
        with torch.no_grad():
            bare, whole = [], []
            for i in range(3):
                bare.append(seconds(lambda: [last_hidden(model, ids) for ids in tokens]))
                file = Path(folder) / f"pass{i}.safetensors"
                whole.append(seconds(lambda f=file: record(f, {}, tokens, partial(last_hidden, model), 1.0)))
            print(f"offline pass / bare forward over the same texts: {min(whole) / min(bare):.3f}")
            made = record(Path(folder) / "pass0.safetensors", {}, tokens, partial(last_hidden, model), 1.0)
            official = sum(map(len, tokens)) * model.config.hidden_size * 4
            print(f"storage: the authors' fp32 files / ours: {official / made.file.stat().st_size:.2f}")
        pairs = []
        for _ in range(PAIRS + 1):
            both = [trainer(kind, args.model, folder, rows, general, dtype) for kind in ("sft", "gere")]
            hand_over.before_training(both[1])  # what is checked and recorded once, before the first step
            pairs.append([seconds(t.train) for t in both])
        ratios = sorted(ours / theirs for theirs, ours in pairs[1:])
        print(
            f"GeRe step / SFTTrainer step, same tokens: {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )
    if not args.no_flips:
        flips(args.model, texts, tokenizer)


if __name__ == "__main__":
    main()
