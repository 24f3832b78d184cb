"""Special cases of families in the table: settings they need, and what TRL and PEFT do with them."""

from __future__ import annotations

from typing import Any

# Training arguments that a family needs, with the reason.
_ROUTER = (
    {"router_aux_loss_coef": 0.0},
    "needs `router_aux_loss_coef=0.0`: SFTTrainer looks for `num_experts` in the configuration, which uses another name",
)
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "granitemoe": _ROUTER,
    "granitemoehybrid": _ROUTER,
    "phimoe": _ROUTER,
}

# Targets of LoRA where PEFT does not take "all-linear", with the reason.
_MAMBA = (["in_proj"], "LoRA on `in_proj`: PEFT refuses `out_proj` and `conv1d` of Mamba layers")
TARGETS: dict[str, tuple[list[str], str]] = {
    "mamba": _MAMBA,
    "mamba2": _MAMBA,
    "falcon_mamba": _MAMBA,
    "falcon_h1": _MAMBA,
    "nemotron_h": (
        ["in_proj", "q_proj"],
        "LoRA on `in_proj` and `q_proj`: PEFT refuses `out_proj` and `conv1d` of Mamba layers",
    ),
    "phimoe": (["q_proj", "v_proj"], "LoRA on attention: the router is a linear layer that returns two tensors"),
}

# SFTTrainer's loss is not the one of the model's own forward pass; the methods train on SFTTrainer's.
LOSS: dict[str, str] = {
    "modernbert-decoder": "SFTTrainer's loss leaves out the transformation before the head",
    "recurrent_gemma": "SFTTrainer's loss leaves out the soft cap of the logits (`logits_soft_cap`)",
    "aya_vision": "SFTTrainer's loss scales the logits by `logit_scale`, the model's own forward pass does not",
}

# Cells that are refused at construction: a piece of the sentence, the methods (None: all), and the reason.
_ENCODER = ("is an encoder-decoder", None, "an encoder would read the tokens that are to be predicted")
REFUSED: dict[str, tuple[str, tuple[str, ...] | None, str]] = {
    "t5": _ENCODER,
    "bart": _ENCODER,
    "paligemma": (
        "attends to later tokens",
        ("Replay", "GeRe", "KIF"),
        "rows of text are refused: without `token_type_ids` the model attends to later tokens; with SFTTrainer too",
    ),
}

# SFTTrainer fails without any method too: a piece of its error.
FAILS: dict[str, str] = {
    "llama4_text": "'MoeCausalLMOutputWithPast' object has no attribute 'last_hidden_state'",
    "llama4": "'Llama4CausalLMOutputWithPast' object has no attribute 'last_hidden_state'",
}


def outcome(kind: str, method: str) -> str:
    """The expected result of a cell."""
    if kind in REFUSED and (REFUSED[kind][1] is None or method in REFUSED[kind][1]):
        return "refused"
    return "SFTTrainer fails" if kind in FAILS else "yes"


def notes(kind: str) -> list[str]:
    """The notes of a family, for the table."""
    found = [table[kind][1] for table in (SETTINGS, TARGETS) if kind in table]
    if kind in LOSS:
        found.append(LOSS[kind])
    if kind in REFUSED:
        found.append(REFUSED[kind][2])
    if kind in FAILS:
        found.append(f"SFTTrainer fails without methods too: `{FAILS[kind]}`")
    return found
