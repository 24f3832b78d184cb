"""A toy world: a tokenizer, tiny models and rows, all built in memory. Importable by torchrun's children."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

WORDS = 62
VOCABULARY = ["<pad>", "<eos>", "<user>", "<assistant>", *[f"w{i}" for i in range(WORDS - 2)]]

CHAT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<assistant> {% generation %}{{ m.content }} <eos>"
    "{% endgeneration %} {% else %}<user> {{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Words separated by spaces; `w0` to `w59` and four special ones."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    made.chat_template = CHAT
    return made


def model(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """A Llama of 4 layers and 32 channels, random weights."""
    set_seed(seed)
    settings = dict(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    return LlamaForCausalLM(LlamaConfig(**{**settings, **config}))


def sentence(generator: torch.Generator, low: int, high: int, shortest: int = 4, longest: int = 11) -> str:
    """Random words `w{low}` to `w{high - 1}`."""
    length = int(torch.randint(shortest, longest, (1,), generator=generator))
    return " ".join(f"w{i}" for i in torch.randint(low, high, (length,), generator=generator).tolist())


def rows(kind: str = "text", number: int = 24, seed: int = 1, low: int = 0, high: int = 30) -> Dataset:
    """Rows of a kind: text, prompt_completion, messages or tokenized."""
    g = torch.Generator().manual_seed(seed)
    if kind == "text":
        return Dataset.from_list([{"text": sentence(g, low, high)} for _ in range(number)])
    if kind == "prompt_completion":
        pairs = [(sentence(g, low, high), " " + sentence(g, low, high, 2, 5)) for _ in range(number)]
        return Dataset.from_list([{"prompt": p, "completion": c} for p, c in pairs])
    if kind == "messages":
        return Dataset.from_list(
            [
                {
                    "messages": [
                        {"role": "user", "content": sentence(g, low, high)},
                        {"role": "assistant", "content": sentence(g, low, high)},
                    ]
                }
                for _ in range(number)
            ]
        )
    if kind == "tokenized":
        ids = [torch.randint(4, 60, (8,), generator=g).tolist() for _ in range(number)]
        return Dataset.from_list([{"input_ids": i, "labels": [-100, *i[1:]]} for i in ids])
    raise ValueError(kind)


def settings(output_dir: Path | str, **changes: Any) -> dict[str, Any]:
    """Arguments of SFTConfig or ContinualConfig for a run of about a second."""
    return {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": 0,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        **changes,
    }


def flat(trained: torch.nn.Module) -> torch.Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().float().flatten() for p in trained.parameters()])


def logs(trainer: Any) -> list[dict[str, Any]]:
    """What a trainer logged, without times and speeds."""
    timed = ("runtime", "per_second")
    return [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in trainer.state.log_history]
