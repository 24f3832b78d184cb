"""A mixture of low-rank experts behind a gate, chosen by the task or by the token (MoELoRA).

By task: Liu et al., "When MOE Meets LLMs: Parameter Efficient Fine-tuning for Multi-task Medical Applications", SIGIR 2024,
https://arxiv.org/abs/2310.18339. By token: as in Luo et al., "MoELoRA: Contrastive Learning Guided Mixture of Experts on
Parameter-Efficient Fine-Tuning for Large Language Models", https://arxiv.org/abs/2402.12851.

    y = W x + alpha / r  sum_e g_e B_e A_e x
    g = softmax(W_g t), t the embedding of the task, or
    g = softmax(W_r x) with all but the top k set to 0 and the rest scaled to the sum 1, of each token by itself
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from hf_continual.inference.base import KindConfig, KindTuner
from hf_continual.inference.names import MOE_LORA
from hf_continual.tensors.expert_gates import balance_loss, contrastive_loss, task_gate, token_gate
from hf_continual.tensors.rank_gates import check_not_spread, gated_layers, weigh_ranks

TASK, TOKEN = GATES = ("task", "token")
GATE = "lora_gate"


@dataclass
class MoELoraConfig(KindConfig, LoraConfig):  # pyrefly: ignore[inconsistent-inheritance]
    """LoRA whose ranks are shared out over experts behind a gate.

    Args:
        experts: E; divides the rank `r`, so that each expert has r / E.
        gate: What the gate sees: the ``"task"`` or the ``"token"``.
        top_k: Experts that a token uses; with the gate by token.
        task_size: K, size of the embedding of a task; with the gate by task.
        tasks: Names of the tasks learned so far, in order; of the gate by task.
    """

    experts: int = 8
    gate: str = TASK
    top_k: int = 2
    task_size: int = 64
    tasks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MOE_LORA  # pyrefly: ignore[bad-assignment]

    @property
    def chooses_by_row(self) -> bool:
        """The gate is the same for all rows of a run, or chooses by the token."""
        return False


class ExpertGate(nn.Module):
    """The gate of one layer, which weighs the ranks of its adapter as a hook of factor A.

    Args:
        config: Sizes.
        layer: The layer.
        name: Of the adapter.
        tuner: What it hangs on; knows the task.
    """

    tuner: MoELoraTuner
    layer: Any
    name: str

    def __init__(self, config: MoELoraConfig, layer: Any, name: str, tuner: MoELoraTuner) -> None:
        super().__init__()
        factor: Any = layer.lora_A[name]
        if (rank := factor.weight.shape[0]) % config.experts:
            raise ValueError(
                f"MoELoRA shares a layer's rank out over its experts, and {config.experts} do not divide the rank {rank} "
                f"evenly. Give a rank that is a multiple of {config.experts}."
            )
        self.config, self.ranks = config, [rank // config.experts] * config.experts
        self.__dict__.update(tuner=tuner, layer=layer, name=name)  # not modules below this one
        width = factor.weight.shape[1] if config.gate == TOKEN else config.task_size
        linear = nn.Linear(width, config.experts, bias=False, device=factor.weight.device, dtype=torch.float32)
        self.weight = linear.weight
        self.embeddings = nn.ParameterList()
        for _ in config.tasks if config.gate == TASK else ():
            self.add_task()

    def add_task(self) -> None:
        """Draw the embedding of a further task from torch's generator."""
        like = self.weight
        self.embeddings.append(nn.Parameter(torch.randn(self.config.task_size).to(like.device, like.dtype)))

    def weigh(self, factor: nn.Module, args: tuple[Tensor, ...], inner: Tensor) -> Tensor:
        """Forward hook of factor A: A x with the ranks of each expert weighted."""
        if self.config.gate == TASK:
            weights = task_gate(self.weight, self._embedding())
        else:
            weights, probabilities, chosen = token_gate(self.weight, args[0], self.config.top_k)
            flat = probabilities.flatten(0, -2), chosen.flatten(0, -2)
            self.tuner.hear("balance", len(flat[0]), lambda mask_N: balance_loss(*flat, mask_N))
        self.tuner.hear("contrastive", inner.shape[:-1].numel(), lambda mask_N: self._contrast(inner, mask_N))
        return weigh_ranks(inner, weights, self.ranks)

    def _embedding(self) -> Tensor:
        task = self.tuner.task
        return self.embeddings[task] if isinstance(task, int) else torch.stack([self.embeddings[i] for i in task])

    def _contrast(self, inner: Tensor, mask_N: Tensor | None) -> Tensor:
        """The contrastive term of a few tokens, evenly spaced over the micro-batch."""
        flat_NR = inner.flatten(0, -2)
        places = torch.linspace(
            0, len(flat_NR) - 1, min(len(flat_NR), self.tuner.contrast_tokens), device=inner.device
        ).long()
        factor: Any = self.layer.lora_B[self.name]
        B_OER = factor.weight.unflatten(1, (self.config.experts, -1)).to(inner.dtype)
        outputs_NEO = torch.einsum("ner,oer->neo", flat_NR[places].unflatten(1, (self.config.experts, -1)), B_OER)
        return contrastive_loss(outputs_NEO, self.tuner.temperature, None if mask_N is None else mask_N[places])


class MoELoraTuner(KindTuner, LoraModel):
    """Puts LoRA with a gate onto the linear layers of a model.

    Attributes:
        task: Place in `MoELoraConfig.tasks` of the task that the gate is set to, or of each row of a batch.
        wanted: Terms of the loss that are computed with a training forward pass, of ``"balance"`` and ``"contrastive"``.
    """

    prefix: str = "lora_"
    contrast_tokens: int = 32
    temperature: float = 0.07

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put adapters and gates onto the model.

        Args:
            model: The base model.
            adapter_name: Under which PEFT keeps them.
            *args: PEFT's.
            **kwargs: PEFT's.

        Raises:
            ValueError: If the model carries an adapter, or layers are of a kind that cannot be weighted.
        """
        config: Any = self.peft_config[adapter_name]
        if len(self.peft_config) > 1:
            raise ValueError(
                "The model carries experts, and can carry one set of them. Train those further, or load the base."
            )
        check_not_spread(model, "MoELoRA")
        self.check_base(config, model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self.task: int | Sequence[int] = max(len(config.tasks) - 1, 0)
        self.wanted: frozenset[str] = frozenset()
        self._heard: dict[str, list[Tensor]] = {}
        self._mask_BS: Tensor | None = None
        self._listening = False
        self.gates: dict[str, ExpertGate] = {}
        if config.experts == 1:
            return  # the only expert has all the weight
        for name, layer in gated_layers(model, adapter_name, "MoELoRA").items():
            gate = ExpertGate(config, layer, adapter_name, self)
            layer.add_module(GATE, nn.ModuleDict({adapter_name: gate}))
            layer.adapter_layer_names = (*layer.adapter_layer_names, GATE)  # pyrefly: ignore[read-only]
            layer.lora_A[adapter_name].register_forward_hook(gate.weigh)
            gate.requires_grad_(not config.inference_mode)
            self.gates[name] = gate

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass; in training the terms of the loss are computed with it."""
        self._heard, self._mask_BS = {}, kwargs.get("attention_mask")
        self._listening = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._listening = False

    def hear(self, term: str, tokens: int, compute: Callable[[Tensor | None], Tensor]) -> None:
        """A layer offers a term of the loss.

        Args:
            term: Its name.
            tokens: Tokens that the layer saw.
            compute: The term, from which of them count.
        """
        if not self.training or term not in self.wanted:
            return
        mask = self._mask_BS
        # Where a layer sees some of the tokens only, as an expert behind a router does, none is padding.
        fits = mask is not None and mask.dim() == 2 and mask.numel() == tokens
        found = compute(mask.flatten() if fits else None)
        # What gradient checkpointing computes again in the backward pass must be computed, and does not count twice.
        if self._listening:
            self._heard.setdefault(term, []).append(found)

    def terms(self) -> dict[str, Tensor]:
        """The terms of the last training forward pass, means over the layers; they are given once."""
        heard, self._heard = self._heard, {}
        return {name: torch.stack(found).mean() for name, found in heard.items()}

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that the gate knows."""
        config: Any = self.active_config
        return config.tasks

    def learn_task(self, name: str) -> None:
        """Set the gate to a task that is to be trained; a new one gets an embedding, drawn from torch's generator.

        Args:
            name: Its name. The embeddings of other tasks are not trained.
        """
        if name not in self.tasks:
            self.tasks.append(name)
            for gate in self.gates.values():
                gate.add_task()
        self.task = self.tasks.index(name)
        for gate in self.gates.values():
            for place, embedding in enumerate(gate.embeddings):
                embedding.requires_grad_(place == self.task)

    def use_task(self, name: str | Sequence[str]) -> None:
        """Set the gate to a task, for all rows that follow, or to one for each row of the batches that follow.

        Args:
            name: Name of a task, or names, one per row.

        Raises:
            ValueError: If the gate sees tokens, or a task was not learned.
        """
        config: Any = self.active_config
        if config.gate != TASK:
            raise ValueError(f"The gate sees the {config.gate}, and needs no task. Leave use_task out.")
        names = [name] if isinstance(name, str) else list(name)
        if unknown := [n for n in names if n not in self.tasks]:
            raise ValueError(
                f"No task is called {unknown[0]!r}: learned were {', '.join(self.tasks) or 'none'}. Name one of them."
            )
        self.task = self.tasks.index(name) if isinstance(name, str) else [self.tasks.index(n) for n in names]

    @contextmanager
    def for_task(self, name: str) -> Iterator[None]:
        """While a task is scored: its own gate where it was learned, else that of the task learned last."""
        config: Any = self.active_config
        before = self.task
        if config.gate == TASK and self.tasks:
            self.use_task(name if name in self.tasks else self.tasks[-1])
        try:
            yield
        finally:
            self.task = before
