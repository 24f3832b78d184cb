"""Chat templates of real models, each on a small tokenizer with that model's special tokens.

Templates that TRL brings are read from it; the others are typed, reduced to user and assistant.
"""

# ruff: noqa: RUF001 - DeepSeek writes its tokens with wide bars.
from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = (
    "what colour is the sky ? blue red green . the sky is blue red . the grass is green . assistant user system model"
    * 9
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
PHI4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
GRANITE = (
    "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A chat template, and what its tokenizer and generation config hold.

    Args:
        template: Its text, or the name of one of TRL's.
        eos: The tokenizer's end of sequence.
        special: Further special tokens.
        stops: What the generation config names as ends.
        bos: The tokenizer's first token.
        plain: Added tokens that are not special.
        end: The token with which the template ends a turn; None if it does so with plain text.
    """

    template: str
    eos: str
    special: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    bos: str | None = None
    plain: tuple[str, ...] = ()
    end: str | None = None


IM = ("<|im_start|>", "<|im_end|>")
FAMILIES = {
    "llama3": Family(
        "llama3", "<|end_of_text|>", ("<|eot_id|>", "<|eom_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"), "<|begin_of_text|>", end="<|eot_id|>",
    ),
    "gemma2": Family("gemma", "<eos>", ("<start_of_turn>", "<end_of_turn>"), ("<eos>", "<end_of_turn>"), "<bos>", end="<end_of_turn>"),
    "gemma3": Family("gemma3", "<eos>", ("<start_of_turn>", "<end_of_turn>"), ("<eos>",), "<bos>", end="<end_of_turn>"),
    "mistral": Family(MISTRAL, "</s>", (), ("</s>",), "<s>", end="</s>"),
    "phi3": Family(
        "phi3", "<|endoftext|>", ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>"), ("<|endoftext|>", "<|end|>"), "<s>", end="<|end|>"
    ),
    "phi4": Family(PHI4, "<|im_end|>", ("<|im_start|>", "<|im_sep|>", "<|endoftext|>"), ("<|im_end|>", "<|endoftext|>"), end="<|im_end|>"),
    "qwen2.5": Family("qwen2_5", "<|endoftext|>", IM, ("<|endoftext|>",), end="<|im_end|>"),
    "qwen3": Family(
        "qwen3", "<|im_end|>", ("<|im_start|>", "<|endoftext|>"), ("<|im_end|>", "<|endoftext|>"),
        plain=("<think>", "</think>"), end="<|im_end|>",
    ),
    "smollm2": Family(SMOLLM2, "<|im_end|>", ("<|im_start|>", "<|endoftext|>"), ("<|im_end|>",), end="<|im_end|>"),
    "gpt-oss": Family(
        "gptoss", "<|return|>", ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"), ("<|return|>", "<|call|>"), end="<|return|>"
    ),
    "deepseek-r1": Family(
        "deepseek_r1_distill", "<｜end▁of▁sentence｜>", ("<｜User｜>", "<｜Assistant｜>"), ("<｜end▁of▁sentence｜>",),
        "<｜begin▁of▁sentence｜>", ("<think>", "</think>"), end="<｜end▁of▁sentence｜>",
    ),
    "granite": Family(GRANITE, "<|end_of_text|>", ("<|start_of_role|>", "<|end_of_role|>"), ("<|end_of_text|>",), end="<|end_of_text|>"),
    "command-r": Family(
        "cohere", "<|END_OF_TURN_TOKEN|>", ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<EOS_TOKEN>"),
        ("<|END_OF_TURN_TOKEN|>",), "<BOS_TOKEN>", end="<|END_OF_TURN_TOKEN|>",
    ),
    # ChatML on a base model whose tokenizer has its tokens, has them as ordinary added ones, or has none of them.
    "chatml-special": Family(CHATML, "<|endoftext|>", IM, ("<|endoftext|>",), end="<|im_end|>"),
    "chatml-added": Family(CHATML, "<|endoftext|>", (), ("<|endoftext|>",), plain=IM, end="<|im_end|>"),
    "chatml-text": Family(CHATML, "<|endoftext|>", (), ("<|endoftext|>",)),
}  # fmt: skip


@functools.cache
def _pieces() -> str:
    """A byte-level tokenizer with a few merges, as JSON."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    return made.to_str()


def tokenizer(name: str, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of a family, with or without a first token before texts."""
    family = FAMILIES[name]
    words = Tokenizer.from_str(_pieces())
    words.add_special_tokens([AddedToken(t, special=True) for t in (family.bos, family.eos, *family.special) if t])
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=family.eos, bos_token=family.bos, pad_token="<pad>", unk_token=None
    )
    made.add_tokens(list(family.plain))
    if adds_bos:
        first = family.bos or family.eos
        made._tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, made.convert_tokens_to_ids(first))]
        )
    file = Path(trl.__file__).parent / "chat_templates" / f"{family.template}.jinja"
    made.chat_template = file.read_text(encoding="utf-8") if len(family.template) < 40 else family.template
    return made
