"""A pool of prompts with keys; each row takes the nearest ones (L2P, Wang et al., CVPR 2022, section 4.2).

The prompts are prepended to a row's embeddings inside the model; callers see an unchanged model: states, logits and
labels have the width of their input. They take `tokens_in_front` positions, and as many entries of the cache.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from hf_continual.inference.base import KindConfig, KindTuner
from hf_continual.inference.names import PROMPT_POOL

TOKENS, UNIFORM = INITS = ("tokens", "uniform")


def normalised(x: Tensor) -> Tensor:
    """``x / |x|`` along the last axis, as the authors: ``x * rsqrt(max(sum x^2, 1e-12))``."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True).clamp(min=1e-12))


def mean_query(embeddings_BSD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """The query of each row: the mean of its embeddings.

    Args:
        embeddings_BSD: Input embeddings.
        mask_BS: Tokens that count; None counts all.

    Returns:
        Queries of shape (B, D), in float32, without gradient.
    """
    x_BSD = embeddings_BSD.detach().float()
    if mask_BS is None:
        return x_BSD.mean(1)
    weights_BS1 = mask_BS.to(x_BSD.dtype)[..., None]
    return (x_BSD * weights_BS1).sum(1) / weights_BS1.sum(1).clamp(min=1)


def similarities(query_BD: Tensor, keys_MD: Tensor) -> Tensor:
    """Cosine of queries and keys, shape (B, M)."""
    # Not a matrix product, which autocast would round to bfloat16: training and inference must select alike.
    return (normalised(query_BD)[:, None] * normalised(keys_MD)).sum(-1)


def select(similarity_BM: Tensor, top: int, batchwise: bool = False) -> Tensor:
    """Select the prompts of each row.

    Args:
        similarity_BM: See `similarities`.
        top: N, prompts per row.
        batchwise: All rows take the N prompts that the rows would most often take alone (the authors'
            ``batchwise_prompt``); ties are broken in the same way, without waiting for the device.

    Returns:
        Indices of shape (B, N).
    """
    index_BN = similarity_BM.topk(top, dim=1).indices
    if not batchwise:
        return index_BN
    counts_M = torch.zeros_like(similarity_BM[0]).scatter_add_(
        0, index_BN.flatten(), torch.ones_like(index_BN.flatten(), dtype=similarity_BM.dtype)
    )
    # Taken ones first, in their order, as `torch.unique` lists them.
    order_M = torch.argsort((counts_M == 0).int(), stable=True)
    return order_M[counts_M[order_M].long().topk(top).indices].expand(len(index_BN), -1)


def pull(query_BD: Tensor, keys_MD: Tensor, index_BN: Tensor) -> Tensor:
    """``sum_bn cos(q_b, k_n) / B`` over the selected keys, a scalar; the loss subtracts it."""
    chosen_BND = normalised(keys_MD)[index_BN]
    return (chosen_BND * normalised(query_BD)[:, None]).sum() / len(query_BD)


def prompted(prompts_MLD: Tensor, index_BN: Tensor, embeddings_BSD: Tensor) -> Tensor:
    """The selected prompts in front of the embeddings, shape (B, N * L + S, D)."""
    front = prompts_MLD[index_BN].flatten(1, 2).to(embeddings_BSD.dtype)
    return torch.cat([front, embeddings_BSD], dim=1)


@dataclass
class PromptPoolConfig(KindConfig):
    """A prompt pool.

    Args:
        pool: M, prompts in the pool.
        length: L, tokens of a prompt.
        top: N, prompts that a row takes.
        batchwise: In training all rows of a micro-batch take the same prompts; see `select`. At inference each row
            takes its own, so that its answer does not depend on the batch.
        init: Initial values of prompts: embeddings of random ``"tokens"``, or ``"uniform"`` in (-1, 1) as in the
            authors' code.
    """

    pool: int = 10
    length: int = 5
    top: int = 5
    batchwise: bool = False
    init: str = TOKENS

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PROMPT_POOL  # pyrefly: ignore[bad-assignment]

    @property
    def tokens_in_front(self) -> int:
        """N * L."""
        return self.top * self.length


class PromptPool(nn.Module, BaseTunerLayer):
    """The prompts (M, L, D) and keys (M, D), and the hooks of the model's body that use them.

    Args:
        tuner: The tuner it belongs to.
    """

    adapter_layer_names = ("prompts", "keys")
    tuner: KindTuner
    weight = bias = None  # pyrefly: ignore[bad-override] - PEFT's look at a layer below, and there is none

    def __init__(self, tuner: KindTuner) -> None:
        super().__init__()
        self.prompts, self.keys = nn.ParameterDict(), nn.ParameterDict()
        self.__dict__["tuner"] = tuner  # not a module below this one
        self.pull: Tensor | None = None
        self.chosen_BN: Tensor | None = None
        self._in_front = 0

    def add(self, name: str, config: PromptPoolConfig, embeddings_VD: Tensor) -> None:
        """Draw prompts and keys, from torch's generator.

        Args:
            name: Name of the adapter.
            config: Sizes.
            embeddings_VD: The model's input embeddings.
        """
        width, device = embeddings_VD.shape[1], embeddings_VD.device
        prompts = torch.empty(config.pool, config.length, width).uniform_(-1, 1)
        if config.init == TOKENS:
            ids = torch.randint(embeddings_VD.shape[0], (config.pool, config.length))
            prompts = embeddings_VD.detach()[ids.to(device)].float()
        self.prompts[name] = nn.Parameter(prompts.to(device))
        self.keys[name] = nn.Parameter(torch.empty(config.pool, width).uniform_(-1, 1).to(device))

    def before(self, body: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the body: put prompts in front of a new row, and count them if one is continued."""
        self._in_front = 0
        if self.disable_adapters:
            return None
        named = dict(zip(inspect.signature(body.forward).parameters, args, strict=False)) if args else {}
        given = {**named, **kwargs}
        config: Any = self.tuner.active_config
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if isinstance(mask, dict) or (mask is not None and mask.dim() != 2):
            raise ValueError(
                "a prompt pool widens the attention mask, but this one was made for a cache of fixed size. Generate with "
                "the default cache (cache_implementation='dynamic')."
            )
        cache = given.get("past_key_values")
        if mask is not None:
            given["attention_mask"] = torch.cat([mask.new_ones(len(mask), config.tokens_in_front), mask], dim=1)
        if positions is not None:
            given["position_ids"] = positions + config.tokens_in_front
        if cache is not None and cache.get_seq_length():
            return (), given
        self._in_front = config.tokens_in_front
        embeds_BSD = given.get("inputs_embeds")
        if embeds_BSD is None:
            embeds_BSD = body.get_input_embeddings()(given["input_ids"])
        given["input_ids"], given["inputs_embeds"] = None, self._prompted(embeds_BSD, mask, body.training)
        if positions is not None:
            first = torch.arange(self._in_front, device=positions.device).expand(*positions.shape[:-1], -1)
            given["position_ids"] = torch.cat([first, given["position_ids"]], dim=-1)
        return (), given

    def _prompted(self, embeds_BSD: Tensor, mask_BS: Tensor | None, training: bool) -> Tensor:
        config: Any = self.tuner.active_config
        name = self.active_adapters[0]
        asked_BS = self.tuner.asked_BS
        counted_BS = mask_BS if asked_BS is None else asked_BS.to(embeds_BSD.device)
        # A copy: FSDP may free the keys after the forward pass, and the key term's backward reads them.
        query_BD, keys_MD = mean_query(embeds_BSD, counted_BS), self.keys[name].to(torch.float32, copy=True)
        with torch.no_grad():
            self.chosen_BN = select(similarities(query_BD, keys_MD), config.top, config.batchwise and training)
        self.pull = pull(query_BD, keys_MD, self.chosen_BN) if training and keys_MD.requires_grad else None
        prompts_MLD = self.prompts[name]
        if self.pull is not None:
            prompts_MLD = (
                prompts_MLD + 0.0 * self.pull
            )  # DDP looks from the output for all that is trained, also the keys
        return prompted(prompts_MLD, self.chosen_BN, embeds_BSD)

    def after(self, body: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """Forward hook of the body: drop the states of the prompts."""
        front = self._in_front
        if not front:
            return None
        if isinstance(output, tuple):
            return (output[0][:, front:], *output[1:])
        output.last_hidden_state = output.last_hidden_state[:, front:]
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(h[:, front:] for h in output.hidden_states)
        return output


class PromptPoolTuner(KindTuner, BaseTuner):
    """Adds a prompt pool to a causal language model."""

    prefix: str = "prompt_pool"
    tuner_layer_cls = PromptPool
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - as PEFT declares it

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add the pool to the model, and freeze everything else.

        Args:
            model: The base model.
            adapter_name: PEFT's name of the pool.
            *args: PEFT's, not used.
            **kwargs: PEFT's, not used.

        Raises:
            ValueError: If the model cannot have one, or already has one.
        """
        config, plain = self.peft_config[adapter_name], model
        body: Any = getattr(plain, "base_model", None)
        takes = set() if body is None else set(inspect.signature(body.forward).parameters)
        if missing := [n for n in ("inputs_embeds", "past_key_values", "attention_mask") if n not in takes]:
            raise ValueError(
                f"a prompt pool puts embeddings in front of a row, and {type(plain).__name__} does not take {missing[0]}. Use a "
                f"transformer with attention."
            )
        if hasattr(model, self.prefix):
            raise ValueError(
                "the model already has a prompt pool, and can have only one. Train that further, or load the base."
            )
        embeddings_VD = body.get_input_embeddings().weight
        if embeddings_VD.dim() != 2:
            raise ValueError(
                "a prompt pool under ZeRO-3: it reads the embeddings before training, and ZeRO-3 has sharded them over the processes by "
                "then. Use ZeRO-2, DDP or FSDP2."
            )
        self.check_base(config, plain)
        pool = PromptPool(self)
        pool.add(adapter_name, config, embeddings_VD)
        self.handles = [
            body.register_forward_pre_hook(pool.before, with_kwargs=True),
            body.register_forward_hook(pool.after, with_kwargs=True),
        ]
        model.add_module(self.prefix, pool)
        model.requires_grad_(False)
        pool.requires_grad_(not config.inference_mode)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        """No module is replaced."""

    @property
    def pool(self) -> PromptPool:
        """The pool."""
        found: Any = self.model.prompt_pool
        return found
