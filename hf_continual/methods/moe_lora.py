"""MoELoRA: a mixture of low-rank experts behind a gate, which shares each layer's adapter out over tasks or tokens.

By task: Liu et al., "When MOE Meets LLMs: Parameter Efficient Fine-tuning for Multi-task Medical Applications", SIGIR 2024,
https://arxiv.org/abs/2310.18339, whose code's numbers are equalled. By token: Luo et al., "MoELoRA: Contrastive Learning
Guided Mixture of Experts on Parameter-Efficient Fine-Tuning for Large Language Models", https://arxiv.org/abs/2402.12851.

    y = W x + alpha / r  sum_e g_e B_e A_e x,     E experts of rank r / E
    by task:   g = softmax(W_g t), t the embedding of the task
    by token:  g = the top k of softmax(W_r x), scaled to the sum 1
    loss = task loss + balance * E sum_e f_e P_e + contrastive * InfoNCE            (means over the adapted layers)

with f_e the share of tokens that use expert e, and P_e its mean probability.

No code of Luo et al. is published: the gate by token and its balance term follow a reimplementation by others, and the
contrastive term is our reading of their text (outputs of one expert are alike, those of different experts are not). It is
unverified, and off.

This is an architecture and does not fight forgetting: the experts are shared, and later tasks move them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from hf_continual.bounds import at_least, between, one_of, whole_number
from hf_continual.inference.kinds import tuner_of
from hf_continual.inference.moe_lora import GATES, TASK, TOKEN, MoELoraConfig, MoELoraTuner
from hf_continual.methods.base import Forward, Method, Run
from hf_continual.paper import Paper
from hf_continual.tasks import name_among
from hf_continual.tensors.expert_gates import balance_loss, contrastive_loss, task_gate, token_gate
from hf_continual.tensors.rank_gates import is_reentrant

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn

    from hf_continual.tasks import Task

__all__ = ["MoELoRA", "balance_loss", "contrastive_loss", "task_gate", "token_gate"]

BALANCE = 0.01


@dataclass
class MoELoRA(Method):
    """Train low-rank experts behind a gate on a frozen model, one set of them through all tasks.

    Idea: a gate lets tasks, or tokens, use different parts of one adapter.
    Hooks: own modules, loss terms. Cost: that of one LoRA adapter of the summed rank, and a product with E columns per layer
    for the gate by token; no further forward pass. Nothing is kept for later tasks but an embedding per task and layer.
    Relations: with one expert it is plain LoRA. Composes with methods for any trainable weights; a new adapter per task
    (`OLoRA` after the first task) is not what it trains.
    Inference: the gate is part of the model, so the result is a folder for `load_moe_lora` and not a plain checkpoint; it
    cannot be merged. The gate by task must be told the task: `use_task`; a plan tells it, tasks that were not learned get the
    gate of the last. Needs no `peft_config`.
    Replayed rows pass through the gate of the task that is trained: they do not say which task they are from.

    Args:
        experts: E; 8 in the published script of the gate by task, 4 in that by token.
        gate: What the gate sees, the ``"task"`` or the ``"token"``.
        r: The rank of all experts together, a multiple of `experts`; 16, or 4 times 8.
        lora_alpha: The update is scaled by lora_alpha / r.
        lora_dropout: Dropout before the experts.
        target_modules: Layers that get experts, as PEFT takes them: a regular expression, or a list of names, separated by
            commas.
        top_k: Experts of a token.
        task_size: Size of a task's embedding.
        balance: Weight of the balance term; None: 0.01 with the gate by token. The gate by task has no such term.
        contrastive: Weight of the contrastive term, on 32 tokens of a micro-batch. Unverified, see above.
        temperature: Of the contrastive term.
        name: Prefix of the logged values.

    Raises:
        TypeError: If a hyper-parameter has the wrong type.
        ValueError: If one is out of range or does not belong to the gate, or the model cannot carry such experts.
    """

    experts: int = 8
    gate: Literal["task", "token"] = "task"
    r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    target_modules: str = "all-linear"
    top_k: int = 2
    task_size: int = 64
    balance: float | None = None
    contrastive: float = 0.0
    temperature: float = 0.07
    name: str = "moe_lora"  # pyrefly: ignore[bad-override]

    paper: ClassVar[Paper] = Paper(
        "When MOE Meets LLMs: Parameter Efficient Fine-tuning for Multi-task Medical Applications",
        "Liu et al.",
        2024,
        arxiv="2310.18339",
        venue="SIGIR 2024",
    )
    _tuner: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        one_of("MoELoRA", "gate", self.gate, GATES)
        for key in ("experts", "r", "lora_alpha", "top_k", "task_size"):
            whole_number("MoELoRA", key, getattr(self, key))
        between("MoELoRA", "temperature", self.temperature, 0, float("inf"))
        between("MoELoRA", "lora_dropout", self.lora_dropout, 0, 1, "[")
        for key in ("balance", "contrastive"):
            if getattr(self, key) is not None:
                at_least("MoELoRA", key, getattr(self, key), 0)
        if self.r % self.experts:
            raise ValueError(
                f"MoELoRA(r={self.r}, experts={self.experts}): the rank is shared out over the experts, and must be a "
                f"multiple of their number. Give r={-(-self.r // self.experts) * self.experts}."
            )
        if self.gate == TOKEN and self.top_k > self.experts:
            raise ValueError(
                f"MoELoRA(top_k={self.top_k}, experts={self.experts}): a token cannot use more experts than there are. Lower top_k."
            )
        if self.gate == TASK and self.balance:
            raise ValueError(
                f"MoELoRA(gate='task', balance={self.balance}): this gate is the same for all tokens of a task, so there is no "
                f"load to balance. Drop balance, or take gate='token'."
            )

    def adapter(self) -> PeftConfig:
        """The experts."""
        names = self.target_modules.split(",") if "," in self.target_modules else self.target_modules
        return MoELoraConfig(
            r=self.r, lora_alpha=self.lora_alpha, lora_dropout=self.lora_dropout, target_modules=names, experts=self.experts,
            gate=self.gate, top_k=self.top_k, task_size=self.task_size,
        )  # fmt: skip

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each term of the loss that is not 0."""
        balance = BALANCE if self.balance is None and self.gate == TOKEN else self.balance or 0.0
        several = {"balance": balance, "contrastive": self.contrastive} if self.experts > 1 else {}
        return {name: weight for name, weight in several.items() if weight}

    def reads_forward(self) -> bool:
        """Whether there is a term."""
        return bool(self.weights)

    def prepare_model(self, model: nn.Module, task: Task) -> None:
        """Set the gates to the task; a new one gets an embedding."""
        tuner = tuner_of(model)
        if not isinstance(tuner, MoELoraTuner):
            raise ValueError(
                f"MoELoRA trains LoRA experts, and the model is a {type(model).__name__} without them. Give MoELoRA to "
                f"ContinualTrainer with the base model, or with the folder that MoELoRA left."
            )
        self._tuner = tuner
        if self.gate == TASK:
            with torch.random.fork_rng(devices=[]):  # what is drawn for the gate moves no other draw
                tuner.learn_task(name_among(task, tuner.tasks))

    def begin_task(self, run: Run) -> None:
        """Let the terms be computed with the forward passes."""
        if self.weights and is_reentrant(run.model):
            raise ValueError(
                "MoELoRA: the terms of its loss are computed inside the model's layers, and reentrant gradient checkpointing "
                "keeps no gradient of what leaves them. Set gradient_checkpointing_kwargs={'use_reentrant': False}, or balance=0."
            )
        self._tuner.wanted, self._tuner.temperature = frozenset(self.weights), self.temperature

    def loss_terms(self, forward: Forward) -> dict[str, Tensor]:
        """The terms, means over the layers, with their weights."""
        return {name: self.weights[name] * term for name, term in self._tuner.terms().items()}

    def release(self) -> None:
        """No term is computed any more."""
        if self._tuner is not None:
            self._tuner.wanted = frozenset()
