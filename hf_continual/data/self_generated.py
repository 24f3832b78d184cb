"""General text written by the model itself, for when none can be stored or downloaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_continual.atomic_files import read_lines, write_lines
from hf_continual.data.cache import cannot_write, locked
from hf_continual.data.distributed import from_first
from hf_continual.ends import added_tokens, end_tokens, padding_token
from hf_continual.tensors.modes import evaluation_mode
from hf_continual.tensors.reference import most_tokens

logger = logging.getLogger(__name__)

# First words of the texts. English; for a model of another language, give rows in that language.
OPENINGS = (
    "The", "In", "A", "When", "Most", "It", "After", "There", "Many", "For", "As", "One", "This", "People", "During",
    "How", "To", "What", "If", "She", "He", "We", "At", "On", "Some", "By", "From", "While", "Every", "Since",
)  # fmt: skip

SHORTEST = 16  # tokens
MOST_TRIES = 4  # times the number of texts requested


def degenerate(tokens: Sequence[int]) -> bool:
    """Whether a text is too short or repetitive: few different tokens, or half of its trigrams repeated."""
    if len(tokens) < SHORTEST:
        return True
    trigrams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return len(set(tokens)) < 0.3 * len(tokens) or len(set(trigrams)) < 0.5 * len(trigrams)


def own_words(
    model: Any, tokenizer: Any, number: int, max_new_tokens: int, seed: int, batch_size: int = 32
) -> list[str]:
    """Sample texts from a model at temperature 1.

    The random numbers of the run are not touched.

    Args:
        model: A causal language model; its training mode is restored.
        tokenizer: Its tokenizer.
        number: Number of texts.
        max_new_tokens: Maximum number of tokens of a text.
        seed: Seed of the sampling.
        batch_size: Texts generated at once.

    Returns:
        The texts, without degenerate ones.

    Raises:
        ValueError: If the model writes too few usable texts.
    """
    device = model.get_input_embeddings().weight.device
    ends, hidden = end_tokens(model, tokenizer), added_tokens(tokenizer).special
    texts: list[str] = []
    tried = 0
    room = most_tokens(model)
    with evaluation_mode(model), torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        while len(texts) < number and tried < MOST_TRIES * number + batch_size:
            first = [_opening(OPENINGS[(tried + i) % len(OPENINGS)], tokenizer, ends) for i in range(batch_size)]
            shortest = min(map(len, first))
            ids = torch.tensor([tokens[:shortest] for tokens in first], device=device)
            written = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=max_new_tokens if room is None else min(max_new_tokens, room - shortest),
                pad_token_id=padding_token(tokenizer), eos_token_id=sorted(ends) or None,
            )  # fmt: skip
            tried += batch_size
            for tokens in written.tolist():
                end = next((i for i in range(shortest, len(tokens)) if tokens[i] in ends), len(tokens))
                # Tokenising the text will add the first token again.
                said = [token for token in tokens[:end] if token not in hidden]
                if not degenerate(said):
                    texts.append(tokenizer.decode(said))
    if len(texts) < number:
        raise ValueError(
            f'rows="self": of {tried} texts that the model wrote, only {len(texts)} were longer than {SHORTEST} tokens and did '
            f"not repeat themselves; {number} are needed. Ask for fewer (num_samples), or give rows."
        )
    logger.info("the model wrote %d texts; %d were discarded", number, tried - len(texts))
    return texts[:number]


def _opening(word: str, tokenizer: Any, ends: frozenset[int]) -> list[int]:
    """Tokens of a first word, without an end token that the tokenizer may add."""
    tokens = list(tokenizer(word)["input_ids"])
    while len(tokens) > 1 and tokens[-1] in ends:
        tokens.pop()
    return tokens


def kept_texts(file: Path, number: int, write: Callable[[], list[str]] | None) -> list[str]:
    """Texts from a file, which one process of one run makes, and makes again if it is damaged.

    Args:
        file: Lines of JSON.
        number: Number of texts it must hold.
        write: Returns the texts; None if they can no longer be written.

    Returns:
        The texts, the same on every process.

    Raises:
        ValueError: If the file is damaged and the texts cannot be written again.
        OSError: If it cannot be written.
    """

    def made() -> list[str]:
        if file.is_file():
            try:
                texts = [row["text"] for row in read_lines(file)]
                problem = None if len(texts) == number else f"it holds {len(texts)} texts, not {number}"
            except (OSError, ValueError, KeyError, TypeError) as error:
                texts, problem = [], f"it cannot be read ({type(error).__name__}: {error})"
            if problem is None:
                return texts
            if write is None:
                raise ValueError(
                    f"GeRe: {file} is damaged ({problem}) and the base model that wrote it is not available. Start from the "
                    f"first task, or give rows."
                )
            logger.warning("%s is not used: %s. It is made again.", file, problem)
        assert write is not None
        texts = write()
        try:
            write_lines(file, [{"text": text} for text in texts])
        except OSError as error:
            raise cannot_write(file, error, f"it must hold {number:,} texts") from error
        return texts

    with locked(file):
        return from_first(made)
