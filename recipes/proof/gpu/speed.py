"""Times on a card, as ratios: each method's step against SFTTrainer's, optimizers, GeRe's pass, evaluation.

Written to ``speed.json`` as they come: the step's ratios with SmolLM2 first, then a random Llama of 1 B, then again, until
the time of this part is used up. Plain training is timed again before every third method; a ratio is to the nearest one before it.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from results import Results, device, seconds_left, synchronize, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

from hf_continual.data.biography import biography_rows
from hf_continual.evaluation.exact_match import generated, teacher_forced
from hf_continual.methods.gere.states import record
from hf_continual.methods.mofo import MoFOOptimizer
from hf_continual.methods.recadam import RecAdamOptimizer
from hf_continual.tensors.reference import last_hidden
from tests import toy
from tests.benchmarks import methods as bench
from tests.benchmarks.recadam import SHAPES

WARM, TIMED, BETWEEN = (
    3,
    8,
    3,
)  # steps before those that are timed, timed steps, methods between two timings of SFTTrainer
UNPACKED = ("l2p", "moe_lora, by task", "sapt_lora", "lfpt5")  # choose for a row as a whole, or write before each row
PROMPTED = "on_policy_replay"  # needs prompts that the model answers
FIRST = ("replay", "gere", "recadam", "freeze", "kif", "ewc", "kl_to_base, recorded")  # most used, timed first


class CardClock(TrainerCallback):
    """Wall seconds of each step, each ended by waiting for the card, and the tokens of all steps."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens = 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the number of tokens, which is logged once, after the last step."""
        self.tokens = float((logs or {}).get("num_tokens", self.tokens))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the first step's time."""
        synchronize()
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep a step's time."""
        synchronize()
        now = time.perf_counter()
        self.times.append(now - self.begin)
        self.begin = now


def changes(packed: bool) -> dict[str, Any]:
    """Training arguments of a timed run."""
    steps = 1 + TIMED if tiny() else WARM + TIMED
    length = 64 if tiny() else 2048
    on_card = device() == "cuda"
    return {
        "use_cpu": not on_card, "bf16": on_card, "max_steps": steps, "max_length": length, "packing": packed,
        "per_device_train_batch_size": 2 if packed else 8, "pad_to_multiple_of": None if packed else 64,
        "model_init_kwargs": {"dtype": "bfloat16" if on_card else "float32"}, "logging_strategy": "steps", "logging_steps": steps,
    }  # fmt: skip


def random_model(folder: Path, tokenizer: Any) -> str:
    """A Llama with random weights, of 1 B parameters, or of the toy's size in a dry run."""
    if not (folder / "config.json").is_file():
        if tiny():
            model: Any = toy.model()
        else:
            with torch.device(device()):
                model = LlamaForCausalLM(
                    LlamaConfig(
                        vocab_size=len(tokenizer), hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=4096, tie_word_embeddings=True,
                        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
                    )
                ).to(torch.bfloat16)  # fmt: skip
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def models() -> dict[str, str]:
    """Folders of the timed models by name; without SmolLM2 only the random one."""
    place = Path(os.environ.get("GPU_WORK", tempfile.gettempdir())) / "models"
    found = {}
    if not tiny():
        from hf_continual.demo.model import embedded_model

        try:
            found["SmolLM2-135M"] = str(embedded_model(torch.bfloat16))
        except FileNotFoundError:
            print("SmolLM2 is not here: only the random model is timed", flush=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(found["SmolLM2-135M"]) if found else toy.tokenizer()
    name = "random-tiny" if tiny() else "random-1B"
    found[name] = random_model(place / name, tokenizer)
    return found


def rows_of(name: str) -> Any:
    """Rows to train on."""
    if name.endswith(PROMPTED):
        return toy.rows("prompt_completion", 48) if tiny() else biography_rows(100)
    return toy.rows(number=48) if tiny() else biography_rows(400, "texts", versions=2).select_columns(["text"])


def measured(name: str, path: str, place: Path, packed: bool) -> tuple[float, float]:
    """Mean seconds of the timed steps (the mean, because some methods work every few steps), and tokens of a step."""
    clock = CardClock()
    bench.run(name, path, place, rows_of(name), changes(packed), clock)
    return statistics.fmean(clock.times[-TIMED:]), clock.tokens / len(clock.times)


def step_ratios(results: Results, begun: float, name: str, path: str, round_: int) -> None:
    """One round over all methods with one model."""
    rest = [m for m in bench.MAKE if m not in FIRST]
    wanted = ["replay", "freeze", "recadam"] if tiny() else [*FIRST, *rest]
    plain: dict[tuple[bool, str], tuple[int, float, float]] = {}  # methods since then, seconds, tokens
    with tempfile.TemporaryDirectory() as temporary:
        for method in wanted:
            if seconds_left(begun) < (0 if tiny() else 12):
                return
            key = f"step, {name}, {method}"
            packed, other = method not in UNPACKED, method if method in ("lfpt5", PROMPTED) else ""
            entry = results.content["found"].get(key, {"ratios": []})
            try:
                kind = (packed, other)
                if plain.get(kind, (BETWEEN,))[0] >= BETWEEN:
                    plain[kind] = (0, *measured(f"sft, {method}", path, Path(temporary), packed))
                since, seconds, tokens = plain[kind]
                taken, own = measured(method, path, Path(temporary), packed)
                plain[kind] = (since + 1, seconds, tokens)
                entry["ratios"].append(round(taken / seconds, 4))
                entry |= {
                    "median": statistics.median(entry["ratios"]), "sft_seconds": seconds, "packed": packed,
                    "tokens": own, "sft_tokens": tokens,
                }  # fmt: skip
            except Exception as error:  # another method may work
                entry["error"] = f"{type(error).__name__}: {error}"[:500]
            results.add(key, entry)
            print(f"round {round_}, {key}: {entry.get('error') or entry['ratios']}", flush=True)


def optimizer_ratios(results: Results) -> None:
    """Optimizers against torch's fused AdamW on the same gradients, rounds in turn."""
    shapes = [(64, 64), (64,)] if tiny() else [*SHAPES, *SHAPES[1:]]
    rounds, steps = (2, 2) if tiny() else (9, 8)
    for dtype in (torch.float32, torch.bfloat16):
        made: dict[str, Any] = {
            "fused": lambda p: torch.optim.AdamW(p, lr=1e-5, fused=True),
            "foreach": lambda p: torch.optim.AdamW(p, lr=1e-5, foreach=True),
            "mofo": lambda p: MoFOOptimizer(p, lr=1e-5, share=0.15),
            "recadam": lambda p: RecAdamOptimizer(p, lr=1e-5, k=0.1, t0=20),
            "recadam, pull_every=8": lambda p: RecAdamOptimizer(p, lr=1e-5, k=0.1, t0=20, pull_every=8),
        }
        ready = {}
        for name, make in made.items():
            torch.manual_seed(0)
            params = [torch.nn.Parameter(torch.randn(s, dtype=dtype, device=device())) for s in shapes]
            for p in params:
                p.grad = torch.randn_like(p)
            ready[name] = make(params)
        times: dict[str, list[float]] = {name: [] for name in ready}
        for _ in range(rounds + 1):
            for name, optimizer in ready.items():
                synchronize()
                begin = time.perf_counter()
                for _ in range(steps):
                    optimizer.step()
                synchronize()
                times[name].append(time.perf_counter() - begin)
        for name, taken in times.items():
            ratios = [a / b for a, b in zip(taken[1:], times["fused"][1:], strict=True)]
            kind = str(dtype).removeprefix("torch.")
            results.add(
                f"optimizer, {kind}, {name} / fused AdamW", {"ratios": ratios, "median": statistics.median(ratios)}
            )


def timed(call: Any) -> float:
    """Wall seconds of a call, the card's work included."""
    synchronize()
    begin = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - begin


def recording_ratio(results: Results, name: str, model: Any, tokens: list[list[int]]) -> None:
    """GeRe's pass over its rows against bare forward passes over them."""
    ratios = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for i in range(2 if tiny() else 6):
            bare = timed(lambda: [last_hidden(model, ids) for ids in tokens])
            file = Path(folder) / f"{i}.safetensors"
            ratios.append(timed(lambda f=file: record(f, {}, tokens, partial(last_hidden, model), 1.0)) / bare)
    results.add(f"GeRe's pass / bare forward, {name}", {"ratios": ratios[1:], "median": statistics.median(ratios[1:])})


def evaluation_speed(results: Results, name: str, model: Any, tokenizer: Any) -> None:
    """Rows per second of generation in batches, as ratios to one row at a time, and of teacher forcing to generation."""
    number, limit = (4, 2) if tiny() else (64, 32)
    rows = (
        toy.rows("prompt_completion", number) if tiny() else biography_rows(number // 4, seed=5).select(range(number))
    )
    generated(model, tokenizer, rows, 2, 2)
    alone = timed(lambda: generated(model, tokenizer, rows, 1, limit))
    found = {"rows": number, "rows_per_second_one_by_one": number / alone}
    for size in (4,) if tiny() else (8, 32, 64):
        found[f"batch {size} / one by one"] = alone / timed(lambda s=size: generated(model, tokenizer, rows, s, limit))
    together = timed(lambda: generated(model, tokenizer, rows, 32, limit))
    found["teacher forcing / generation"] = together / timed(lambda: teacher_forced(model, tokenizer, rows, 32))
    results.add(f"evaluation, {name}", found)


def main() -> None:
    """Time everything that fits."""
    begun = time.monotonic()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    results = Results("speed")
    ready = models()
    optimizer_ratios(results)
    texts = rows_of("sft")["text"]
    for name, path in ready.items():
        dtype = torch.bfloat16 if device() == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device()).eval()
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
        tokens = [tokenizer(text)["input_ids"][:512] for text in texts[: 4 if tiny() else 64]]
        recording_ratio(results, name, model, tokens)
        evaluation_speed(results, name, model, tokenizer)
        del model
    for round_ in range(1 if tiny() else 5):
        for name, path in ready.items():
            step_ratios(results, begun, name, path, round_)


if __name__ == "__main__":
    main()
