"""Learning to prompt for continual learning (L2P), Wang et al., CVPR 2022, arXiv:2112.08654.

A pool of M prompts with keys; a row's query q(x) selects the N prompts whose keys are nearest by cosine, and they are
put in front of its embeddings. The model is frozen; with S_x the selected prompts (section 4.2, equation 5)

    loss = task loss + lambda * sum_{n in S_x} distance(q(x), k_n),

in the authors' code ``- lambda * sum_{b,n} cos(q_b, k_n) / B`` with lambda = 0.1, as here. Here q(x) is the mean of
the input embeddings of the question, as in language-model ports; the original uses the [CLS] state of the frozen
image model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from hf_continual.bounds import at_least, one_of, whole_number
from hf_continual.inference.kinds import tuner_of
from hf_continual.inference.prompt_pool import (
    INITS,
    TOKENS,
    PromptPoolConfig,
    PromptPoolTuner,
    mean_query,
    prompted,
    pull,
    select,
    similarities,
)
from hf_continual.methods.base import Forward, Method
from hf_continual.paper import Paper

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn

    from hf_continual.tasks import Task

__all__ = ["L2P", "mean_query", "prompted", "pull", "select", "similarities"]


@dataclass
class L2P(Method):
    """Train a pool of prompts and their keys on a frozen model; each row chooses its prompts.

    Idea: rows of different tasks choose different prompts, so that a new task moves the prompts of an old one little, and no
    task has to be given at inference. Hooks: own modules, loss terms. Cost: N * L more tokens in each row, M * (L + 1)
    * D trainable parameters; no second forward pass, as the query comes from the embeddings.
    Relations: soft prompts as in prompt tuning, with a choice; `batchwise` is the authors' vote of a batch.
    Inference: the choice is made there too, so the result is a folder for `load_prompt_pool` and not a plain checkpoint; it
    cannot be merged. Needs no `peft_config`; rows may not be packed. Composes with methods for any trainable weights; one
    that looks for LoRA or for the model's own weights finds none to train.

    Args:
        pool: M, prompts in the pool; 10 in the authors' code. Fixed by the first task, as are `length` and `top`.
        length: L, tokens of a prompt; the authors' is 5.
        top: N, prompts of a row; the authors' is 5.
        weight: lambda of the key term; the authors' is 0.1. 0 keeps the keys at their initial values.
        batchwise: In training all rows of a micro-batch take the prompts that most of them choose, as the authors do; at
            inference a row chooses alone, so that its answer does not depend on the batch.
        init: Initial values of prompts: embeddings of random ``"tokens"``, or ``"uniform"`` in (-1, 1), the authors'
            for images.
        name: Prefix of the logged values.

    Raises:
        TypeError: If a hyper-parameter has the wrong type.
        ValueError: If one is out of range, `top` exceeds `pool`, or rows are packed.
    """

    pool: int = 10
    length: int = 5
    top: int = 5
    weight: float = 0.1
    batchwise: bool = False
    init: str = TOKENS
    name: str = "l2p"  # pyrefly: ignore[bad-override]

    paper: ClassVar[Paper] = Paper(
        "Learning to Prompt for Continual Learning",
        "Wang et al.",
        2022,
        arxiv="2112.08654",
        venue="CVPR 2022",
    )
    _tuner: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for key in ("pool", "length", "top"):
            whole_number("L2P", key, getattr(self, key))
        if self.top > self.pool:
            raise ValueError(
                f"L2P(pool={self.pool}, top={self.top}): a row cannot take more prompts than the pool has. Lower top, or raise pool."
            )
        at_least("L2P", "weight", self.weight, 0)
        one_of("L2P", "init", self.init, INITS)

    def adapter(self) -> PeftConfig:
        """The pool."""
        return PromptPoolConfig(
            pool=self.pool, length=self.length, top=self.top, batchwise=self.batchwise, init=self.init
        )

    def reads_forward(self) -> bool:
        """True if there is a key term."""
        return self.weight > 0

    def reads_reference(self) -> bool:
        """Always: it reads the embeddings, and a few values of every weight, to make the pool."""
        return True

    def prepare_model(self, model: nn.Module, task: Task) -> None:
        """Find the pool, which an earlier task may have trained, and train its keys if there is a term for them."""
        tuner = tuner_of(model)
        if not isinstance(tuner, PromptPoolTuner):
            raise ValueError(
                f"L2P trains a prompt pool, but the model is a {type(model).__name__} without one. Give L2P to ContinualTrainer "
                f"with the base model, or with the folder that L2P left."
            )
        self._tuner = tuner
        config: Any = tuner.active_config
        config.batchwise = self.batchwise
        if not self.weight:
            tuner.pool.keys.requires_grad_(False)

    def loss_terms(self, forward: Forward) -> dict[str, Tensor]:
        """``-lambda * sum_{b,n} cos(q_b, k_n) / B`` over the prompts that the rows of the micro-batch took."""
        pulled = self._tuner.pool.pull
        assert pulled is not None
        return {"pull": -self.weight * pulled}
