"""A causal language model whose next token is looked up: it has learned sequences exactly, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class ScriptedConfig(PreTrainedConfig):
    """Sizes of a scripted model."""

    model_type = "scripted"

    def __init__(self, vocab_size: int = 8, **kwargs: object) -> None:
        self.vocab_size = vocab_size
        self.num_hidden_layers, self.hidden_size, self.num_attention_heads = 1, vocab_size, 1
        super().__init__(**kwargs)


class Body(torch.nn.Module):
    """Reads the tokens so far, which it keeps in the cache as keys, and shows the next as a one-hot state."""

    def __init__(self, config: ScriptedConfig) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(config.vocab_size, 1)
        self.size, self.cached = config.vocab_size, True
        self.script: Mapping[tuple[int, ...], int] = {}
        self.otherwise = 0

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **_):
        if self.cached and use_cache:
            past_key_values = DynamicCache() if past_key_values is None else past_key_values
            keys = input_ids[:, None, :, None].float()
            seen = past_key_values.update(keys, keys, 0)[0][:, 0, :, 0].long()
        else:
            seen, past_key_values = input_ids, None
        mask = torch.ones_like(seen) if attention_mask is None else attention_mask[:, : seen.shape[1]]
        state = torch.zeros(*input_ids.shape, self.size)
        for row in range(len(seen)):
            for column in range(input_ids.shape[1]):
                upto = seen.shape[1] - input_ids.shape[1] + column + 1
                context = tuple(seen[row, :upto][mask[row, :upto].bool()].tolist())
                state[row, column, self.script.get(context, self.otherwise)] = 1.0
        return BaseModelOutputWithPast(last_hidden_state=state, past_key_values=past_key_values)


class ScriptedLM(PreTrainedModel, GenerationMixin):
    """The model.

    Args:
        config: Its sizes.
    """

    config_class = ScriptedConfig
    base_model_prefix = "body"

    def __init__(self, config: ScriptedConfig) -> None:
        super().__init__(config)
        self.body = Body(config)
        self.head = torch.nn.Linear(config.vocab_size, config.vocab_size, bias=False)
        self.post_init()
        self.head.weight.data = 20.0 * torch.eye(config.vocab_size)

    def _init_weights(self, module):
        pass

    def get_input_embeddings(self):
        return self.body.embed

    def get_output_embeddings(self):
        return self.head

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, labels=None, **_
    ):
        out = self.body(input_ids, attention_mask, position_ids, past_key_values, use_cache)
        return CausalLMOutputWithPast(logits=self.head(out.last_hidden_state), past_key_values=out.past_key_values)

    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        if self.body.cached:
            return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask"), "use_cache": False}


def scripted(
    size: int, otherwise: int, learned: Sequence[tuple[Sequence[int], Sequence[int]]] = (), cached: bool = True
) -> ScriptedLM:
    """A model that has learned sequences.

    Args:
        size: Of the vocabulary.
        otherwise: What it answers where it has learned nothing.
        learned: Token ids and labels of each sequence; only what has a label is learned.
        cached: Whether it has a cache of keys.

    Returns:
        The model.
    """
    model = ScriptedLM(ScriptedConfig(vocab_size=size)).eval()
    script = {}
    for ids, labels in learned:
        for place, label in enumerate(labels):
            if place and label != -100:
                script[tuple(ids[:place])] = label
    model.body.script, model.body.otherwise, model.body.cached = script, otherwise, cached
    return model
