"""Cost of a step with each baseline against SFTTrainer's, and the bytes it keeps per trainable parameter.

    python tests/benchmarks/methods.py [MODEL] [--methods NAME ...] [--rounds N] [--small]

MODEL is a folder or Hub id; by default the embedded SmolLM2-135M, LoRA of rank 8 on all linear layers, float32, second task;
`--small` uses a random Llama of 8 layers and 384 channels, whose steps are so short that overhead shows. One thread,
processor time; plain and method in turn, the median of a round's steps, then of the rounds' ratios. Passes before the
first step and after the last are not steps and are not in the ratio.

LFPT5 trains a soft prompt of 20 tokens, and so does SFTTrainer beside it. A model that has learned nothing writes no sample
that can be read, so it is handed as many rows as it would have written, a fifth of the task's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).parents[2]))

import datasets
import torch
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from hf_continual import (
    EWC,
    KIF,
    L2P,
    LAMOL,
    LFPT5,
    MIGU,
    OSFT,
    SLAO,
    VRMCL,
    ContinualConfig,
    ContinualTrainer,
    EntropyWeighted,
    FreezeLayers,
    GeRe,
    GradientProjection,
    KLToBase,
    MaskSurprising,
    MoELoRA,
    MoFO,
    OLoRA,
    OnPolicyReplay,
    RecAdam,
    Replay,
    SAPTLoRA,
    SlowWeights,
    TaskVector,
    TaSL,
)
from hf_continual.data.biography import biography_rows
from tests import toy

STEPS = 6
SAME_ADAPTER = ("ewc", "tasl", "slao", "on_policy_replay")  # train the adapter of an earlier task further
MAKE: dict[str, Any] = {
    "ewc": lambda rows: EWC(weight=1e4, rows=8),
    "o_lora": lambda rows: OLoRA(),
    "o_lora, merged": lambda rows: OLoRA(),
    "migu": lambda rows: MIGU(first_task=True),
    "mofo": lambda rows: MoFO(),
    "osft": lambda rows: OSFT(),
    "slow_weights": lambda rows: SlowWeights(),
    "tasl": lambda rows: TaSL(),
    "gradient_projection": lambda rows: GradientProjection(runs=1, steps=1, layers="all"),
    "task_vector": lambda rows: TaskVector(),
    "l2p": lambda rows: L2P(),
    "moe_lora, by task": lambda rows: MoELoRA(experts=4, r=8, lora_alpha=8),
    "moe_lora, by token": lambda rows: MoELoRA(experts=4, r=8, lora_alpha=8, gate="token"),
    "sapt_lora": lambda rows: SAPTLoRA(lora_alpha=8),
    "lamol": lambda rows: LAMOL(gamma=0, gen_marker="w57", answer_marker="w58"),
    "lfpt5": lambda rows: LFPT5(gamma=0.2, gen_marker="w57", answer_marker="w58"),
    "vrmcl": lambda rows: VRMCL(),
    "vrmcl, momentum 0": lambda rows: VRMCL(momentum=0.0),
    "mask_surprising": lambda rows: MaskSurprising(threshold=62.0, cache_dir="build/bench-base"),
    "entropy_weighted": lambda rows: EntropyWeighted(),
    "kl_to_base, recorded": lambda rows: KLToBase(cache_dir="build/bench-base"),
    "kl_to_base, adapter": lambda rows: KLToBase(source="adapter"),
    "replay": lambda rows: Replay(rows, ratio=0.25),
    "gere": lambda rows: GeRe(rows, ratio=0.25, cache_dir="build/bench-base"),
    "freeze": lambda rows: FreezeLayers(bottom=1),
    "kif": lambda rows: KIF(rows, inner_steps=4, outer_steps=2),
    "on_policy_replay": lambda rows: OnPolicyReplay(share=0.25, ratio=0.25),
    "slao": lambda rows: SLAO(),
    "recadam": lambda rows: RecAdam(anneal="none", pull=0.01),
    "recadam, fisher": lambda rows: RecAdam(anneal="none", pull=0.01, fisher=rows.select(range(8))),
}


class Clock(TrainerCallback):
    """Processor seconds of each step, from the end of the one before: with the passes that methods make before it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.process_time()
        self.times.append(now - self.begin)
        self.begin = now


def kept(thing: Any, seen: set[int], found: dict[int, int]) -> None:
    """Bytes of every tensor that an object of the library holds, by storage."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if torch.is_tensor(thing) and not isinstance(thing, torch.nn.Parameter):
        found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    elif isinstance(thing, dict):
        for value in thing.values():
            kept(value, seen, found)
    elif isinstance(thing, list | tuple | set):
        for value in thing:
            kept(value, seen, found)
    elif type(thing).__module__.startswith("hf_continual.") and "trainer" not in type(thing).__module__:
        for key, value in vars(thing).items():
            if key not in ("params", "residuals", "_built"):  # the weights themselves
                kept(value, seen, found)


def state_bytes(trainer: Any) -> float:
    """Bytes per trainable parameter on top of AdamW's two moments."""
    found: dict[int, int] = {}
    for method in trainer.methods:
        kept(method, set(), found)
    more = 0
    for state in trainer.run.optimizer.state.values():
        more += sum(state[k].nbytes for k in ("anchor", "fisher", "residual") if k in state)
    return (sum(found.values()) + more) / sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)


def samples(path: str, number: int) -> list[dict[str, list[int]]]:
    """Rows as LFPT5 would have written them."""
    tokenizer, made = AutoTokenizer.from_pretrained(path), []
    for row in toy.rows("prompt_completion", number, seed=5):
        asked, said = (tokenizer(row[part])["input_ids"] for part in ("prompt", "completion"))
        said = [*said, tokenizer.eos_token_id]
        made.append({"input_ids": [*asked, *said], "labels": [*[-100] * len(asked), *said]})
    return made


def run(
    name: str, path: str, folder: Path, rows: Any, changes: Mapping[str, Any] | None = None, clock: Any = None
) -> tuple[list[float], float]:
    """Seconds of each step, and bytes of state at the last one; ``sft, NAME`` is plain training of what the method trains.

    `changes` are training arguments for other hardware, `clock` is a callback with `times` for it.
    """
    settings = {
        "output_dir": str(folder / "out"), "per_device_train_batch_size": 4, "bf16": False, "use_cpu": True, "report_to": [],
        "max_steps": STEPS, "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "max_length": 64,
        "gradient_checkpointing": False, "pad_to_multiple_of": 64, "model_init_kwargs": {"dtype": "float32"},
        **(changes or {}),
    }  # fmt: skip
    common: dict[str, Any] = {"train_dataset": rows, "processing_class": AutoTokenizer.from_pretrained(path)}
    lora: Any = LoraConfig(r=8, target_modules="all-linear")
    if name.endswith("lfpt5"):
        lora = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)
    clock, held = clock or Clock(), [0.0]
    if name.startswith("sft"):
        trainer: Any = SFTTrainer(path, SFTConfig(**settings), peft_config=lora, **common)
    else:
        start, predecessor = path, None
        own = name.startswith(("moe_lora", "sapt_lora"))
        if name.startswith((*SAME_ADAPTER, "o_lora", "sapt_lora")):
            start = first(name.split(",")[0], path, folder, settings, common, None if own else lora)
        if name.endswith("merged"):
            start, predecessor = path, start
        new = not own and not name.startswith((*SAME_ADAPTER, "l2p"))  # l2p supplies its own modules
        trainer = ContinualTrainer(
            start, ContinualConfig(**settings, predecessor=predecessor), peft_config=lora if new else None,
            methods=[MAKE[name](rows)], **common,
        )  # fmt: skip
        *_, method = trainer.methods  # after what it is made of, such as GeRe's replay
        if name == "lfpt5":
            method._pseudo = samples(path, len(rows) // 5)
        end = method.end_task
        method.end_task = lambda run: (held.__setitem__(0, state_bytes(trainer)), end(run))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)
    trainer.train()
    return clock.times[1:], held[0]  # the first step makes the optimizer's state


def first(name: str, path: str, folder: Path, settings: dict, common: dict, lora: Any) -> str:
    """Folder of an adapter that learned an earlier task with the method."""
    goal = folder / f"first-{name}"
    if not goal.is_dir():
        made = ContinualTrainer(
            path, ContinualConfig(**{**settings, "max_steps": 1, "output_dir": str(goal)}), peft_config=lora,
            methods=[MAKE[name](common["train_dataset"])], **common,
        )  # fmt: skip
        made.remove_callback(PrinterCallback)
        made.train()
        made.save_model()
    return str(goal)


def small_model() -> str:
    """Folder of a small random model with the tests' tokenizer."""
    folder = tempfile.mkdtemp()
    toy.model(hidden_size=384, intermediate_size=1024, num_hidden_layers=8).save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)
    return folder


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--methods", nargs="+", default=list(MAKE))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    rows = biography_rows(60, "texts", versions=2).select_columns(["text"])
    if args.small:
        args.model, rows = small_model(), toy.rows(number=48)
    elif args.model is None:
        from hf_continual.demo.model import embedded_model

        args.model = str(embedded_model())
    with tempfile.TemporaryDirectory() as place:
        ratios: dict[str, list[float]] = {name: [] for name in args.methods}
        state: dict[str, float] = {}
        for _ in range(args.rounds):
            for name in args.methods:
                plain, _ = run(f"sft, {name}", args.model, Path(place), rows)
                times, state[name] = run(name, args.model, Path(place), rows)
                ratios[name].append(statistics.median(times) / statistics.median(plain))
                print(f"{name}: {ratios[name][-1]:.3f}, {state[name]:.2f} bytes", file=sys.stderr, flush=True)
        for name, found in ratios.items():
            print(
                f"step time, {name} / SFTTrainer: {statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f}); "
                f"state, bytes per trainable parameter: {state[name]:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
