r"""OSFT: learn only in the directions of each weight that have small singular values.

Nayak et al., "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning", 2025,
https://arxiv.org/abs/2504.07097 (Orthogonal Subspace Fine-Tuning; PEFT calls it OSF).

What a model knows is mostly in the directions of a weight with large singular values. With W_0 = sum_i s_i u_i v_i^T when the task
starts, and U, V of the R largest, the change D = W - W_0 must leave these alone: U^T D = 0 and D V = 0. In each step

    before:  G <- (1 - U U^T) G (1 - V V^T)
    after:   W <- W - U (U^T W - s V^T),   then   W <- W - (W V - U s) V^T

Projecting the gradient is not enough: Adam divides each entry by its own second moment, and weight decay shrinks what should stay.
The second line puts the preserved directions back to where they were, not to where the last step found them, so that
nothing adds up. Measured on a toy Llama in float32, preserve 0.5, 50 steps of AdamW, weight decay 0.1, the worst weight:

    |U^T D| / |s|, the preserved part's movement    2e-7 here,  0.44 with the gradients projected only
    |U^T D| / |D|, part of the update that leaks    2e-7 here,  0.32 with the gradients projected only,  0.16 with PEFT 0.21's OSF

Full weights: the weight itself is trained, where the paper trains the factors U_low, s_low, V_low of the rest. Both allow
exactly the changes (1 - U U^T) M (1 - V V^T); the saved model is a plain checkpoint, and the optimizer sees weights.

LoRA, also on a base in 4 or 8 bits: W_0 is the dequantised base with earlier, frozen adapters, and the trained product must not
act in its subspace. Both factors are projected, which is the stricter of two ways: U^T B = 0 and A V = 0, so that U^T (B A) = 0
and (B A) V = 0 (and not only U^T (B A) V = 0). A new A loses its part in V when the task starts.

Rank: R = preserve min(O, I) for each weight, for a share given by task. The paper sets it per layer from an importance of
layers; PEFT advises to preserve more with every task. A list does the latter.

Memory: U, s and V in float32, 4 R (O + I) bytes per weight: at preserve 0.5 as much as float32 weights, also for LoRA. They
are not in checkpoints: a resumed run computes them again from the weights that training starts from, by the same
decomposition, and compares the singular values with those of the checkpoint. Bit for bit on the same machine and number of
threads; elsewhere to rounding. Cost: one SVD per weight before the first step, divided among processes; per step 16 R O I
operations per full weight (as much as 2.7 R tokens of training), thin products for LoRA.

Weights in bfloat16 are rounded after the projection, so that 1e-3 to 1e-2 of the update leaks; train float32 weights
with ``bf16=True``. Adapters on 4-bit bases are in bfloat16 and leak as much.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_continual.bounds import between, one_of
from hf_continual.methods.base import Method, Run, State
from hf_continual.paper import Paper
from hf_continual.tensors.adapters import factor_pairs
from hf_continual.tensors.base_weights import adapted_weight, linear_weights
from hf_continual.tensors.flat import local
from hf_continual.tensors.subspace import (
    Subspace,
    exact_products,
    moved,
    put_back_,
    remove_left_,
    remove_right_,
    top_subspace,
)
from hf_continual.tensors.whole import sharded_as

__all__ = ["OSFT"]

logger = logging.getLogger(__name__)

TOUCHES = 1e-3  # part of an adapter in the preserved directions beyond which it was not trained outside of them


@dataclass
class OSFT(Method):
    """Train only the directions of each weight that have small singular values.

    Idea: large singular values hold what the model knows; a task is learned in the rest. No old rows are needed.
    Hooks: gradients, after step. Cost: an SVD per weight before the first step, four products with the preserved directions in each
    step, memory for these; see the module's docstring. Relations: O-LoRA keeps adapters apart from each other, OSFT from the
    base. Composes with everything; put it last, since methods after it may move what it preserves. In a later task the weights
    of that task's start are preserved, earlier tasks included: with LoRA if the earlier adapter is merged or stacked.

    Args:
        preserve: Share of the singular directions of each weight that does not move, at least 0 and below 1; 0 is plain
            fine-tuning. A list gives one per task, and its last value is for all later ones, such as ``[0.25, 0.5, 0.75]``.
        layers: ``"linear"``: weights of linear layers, except the language-model head; embeddings, norms and biases are trained
            as usual (FreezeLayers keeps them). ``"all"``: every trained matrix, embeddings and head included.
        name: Prefix of the logged values, and of its files.

    Raises:
        TypeError: If a hyper-parameter has the wrong type.
        ValueError: If one is out of range, no matrix is trained, or an adapter already acts in the preserved directions.
    """

    preserve: float | list[float] = 0.5
    layers: Literal["linear", "all"] = "linear"
    name: str = "osft"  # pyrefly: ignore[bad-override]

    bytes_per_parameter: ClassVar[float] = 4.0  # at preserve 0.5; of a LoRA, per parameter of the weights it adapts
    paper: ClassVar[Paper] = Paper(
        "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning",
        "Nayak et al.",
        2025,
        arxiv="2504.07097",
        venue="ICLR 2026",
    )
    _weights: dict[str, Subspace] = field(default_factory=dict, init=False, repr=False, compare=False)
    _factors: dict[tuple[str, str], Subspace] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.preserve, Sequence) and not isinstance(self.preserve, str) and not len(self.preserve):
            raise ValueError("OSFT(preserve=[]) is empty. Give one share per task, such as [0.25, 0.5], or one number.")
        for share in self.preserve if isinstance(self.preserve, list) else [self.preserve]:
            between("OSFT", "preserve", share, 0, 1, "[", "It is the share of directions that does not move.")
        one_of("OSFT", "layers", self.layers, ("linear", "all"))

    def share(self, task: int) -> float:
        """The share that is preserved in a task, counted from 0."""
        shares = self.preserve if isinstance(self.preserve, list) else [self.preserve]
        return shares[min(task, len(shares) - 1)]

    def reads_reference(self) -> bool:
        """Always: it decomposes the weights that training starts from."""
        return True

    @torch.no_grad()
    def prepare(self, run: Run) -> None:
        """Decompose the weights that training starts from, also in a resumed run, and project new adapters."""
        self.release()
        share, params = self.share(run.task.index), run.named_parameters()
        if not share:
            return
        pairs, weights = self._chosen(run, params)
        todo: list[Any] = [*pairs, *weights]
        for i, key in enumerate(
            tqdm(todo, desc=f"{self.name}: singular values", disable=not run.is_main_process, leave=False)
        ):
            weight: Any = adapted_weight(run.model, key[0]) if isinstance(key, tuple) else params[key].detach()
            rank = int(share * min(weight.shape))
            if rank:
                (self._factors if isinstance(key, tuple) else self._weights)[key] = _shared(run, weight, rank, i)
        with exact_products():
            for (a, b), space in self._factors.items():
                self._start_adapter(a, params[a].detach(), params[b].detach(), space)
        self._say(share, len(params) - len(weights) - 2 * len(pairs))

    def _chosen(self, run: Run, params: Mapping[str, nn.Parameter]) -> tuple[list[tuple[str, str]], list[str]]:
        """Names of the pairs of factors, and of the full weights."""
        if any("lora_magnitude_vector" in name for name in params):
            raise ValueError(
                "OSFT: the adapter has a trained magnitude (DoRA), which scales the base weight as a whole, so that no direction "
                "of it stays. Give LoraConfig(use_dora=False)."
            )
        pairs = [
            pair
            for pair in factor_pairs(params).values()
            if params[pair[0]].dim() == 2 and adapted_weight(run.model, pair[0]) is not None
        ]
        linear = linear_weights(run.model)
        full = [
            name
            for name, p in params.items()
            if p.dim() == 2 and "lora_" not in name and (self.layers == "all" or name in linear)
        ]
        if not pairs and not full:
            raise ValueError(
                f"OSFT(layers={self.layers!r}): none of the {len(params)} trained parameters is the weight of a linear layer or a "
                f"LoRA adapter of one, such as {next(iter(params), 'none')}. Freeze less, adapt linear layers "
                f"(LoraConfig(target_modules='all-linear')), or give layers='all'."
            )
        return pairs, full

    def _start_adapter(self, name: str, A_RI: Tensor, B_OR: Tensor, space: Subspace) -> None:
        """Remove a new A's part in the preserved directions; refuse an adapter that was trained in them."""
        length = torch.linalg.vector_norm
        if B_OR.any():
            inside = length(space.left(B_OR.float())) / length(B_OR.float())
            inside = torch.maximum(inside, length(A_RI.float() @ space.V_IR) / length(A_RI.float()).clamp(min=1e-30))
            if inside > (TOUCHES if B_OR.dtype == torch.float32 else 30 * TOUCHES):
                raise ValueError(
                    f"OSFT: the adapter that is trained further already acts in the preserved directions of its base ({name}: "
                    f"{float(inside):.1%} of a factor), and the projection would change it. Give a new adapter "
                    f"(peft_config=LoraConfig(...); between_tasks: new_adapter in a plan), which is stacked on the old one."
                )
        remove_right_(A_RI, space)
        remove_left_(B_OR, space)

    def _say(self, share: float, others: int) -> None:
        spaces = [*self._weights.values(), *self._factors.values()]
        size = sum(4 * (s.U_OR.numel() + s.V_IR.numel() + s.s_R.numel()) for s in spaces)
        logger.info(
            "%s: %g of the directions of %d weights are preserved (%.1f MiB); %d other tensors are trained as usual.",
            self.name, share, len(spaces), size / 2**20, others,
        )  # fmt: skip

    def begin_task(self, run: Run) -> None:
        """Move the directions to their devices, divided over the processes like the weights."""
        params, add_up = run.named_parameters(), run.sum if run.is_sharded else None
        for key, space in [*self._weights.items(), *self._factors.items()]:
            rows = params[key[1] if isinstance(key, tuple) else key]
            at = local(rows.detach()).device
            space.U_OR = local(sharded_as(space.U_OR.to(at), rows))
            space.s_R, space.V_IR, space.add_up = space.s_R.to(at), space.V_IR.to(at), add_up

    @torch.no_grad()
    def edit_gradients(self, params: Mapping[str, nn.Parameter]) -> None:
        """Project the gradients."""
        with exact_products():
            for name, space in self._weights.items():
                if (grad := params[name].grad) is not None:
                    remove_left_(local(grad), space)
                    remove_right_(local(grad), space)
            for (a, b), space in self._factors.items():
                if (grad := params[a].grad) is not None:
                    remove_right_(local(grad), space)
                if (grad := params[b].grad) is not None:
                    remove_left_(local(grad), space)

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Put the preserved directions back."""
        params = run.named_parameters()
        with exact_products():
            for name, space in self._weights.items():
                put_back_(local(params[name].detach()), space)
            for (a, b), space in self._factors.items():
                remove_right_(local(params[a].detach()), space)
                remove_left_(local(params[b].detach()), space)

    def measure(self, run: Run) -> dict[str, Tensor]:
        """The largest relative movement of a weight's preserved part; for adapters, their part in the preserved directions."""
        params = run.named_parameters()
        with exact_products(), torch.no_grad():
            found = list(self._moved(params))
        return {"preserved_moved": torch.stack(found).max()} if found else {}

    def _moved(self, params: Mapping[str, nn.Parameter]) -> Iterator[Tensor]:
        for name, space in self._weights.items():
            yield moved(local(params[name].detach()), space)
        for (_, b), space in self._factors.items():
            held = local(params[b].detach()).float()
            squares = held.square().sum() if space.add_up is None else space.add_up(held.square().sum())
            yield torch.linalg.vector_norm(space.left(held)) / squares.sqrt().clamp(min=1e-30)

    def state_dict(self, run: Run) -> State:
        """The singular values, to recognise the weights that training started from."""
        named = {
            key[0] if isinstance(key, tuple) else key: s for key, s in [*self._weights.items(), *self._factors.items()]
        }
        return {name: space.s_R.cpu() for name, space in named.items()}

    def load_state_dict(self, state: State, run: Run) -> None:
        """Compare the singular values with those that the run started with.

        Args:
            state: What `state_dict` returned.
            run: The run.

        Raises:
            ValueError: If they differ.
        """
        for name, now in self.state_dict(run).items():
            then = state.get(name)
            if then is None or then.shape != now.shape or not torch.allclose(then, now, rtol=1e-3, atol=1e-5):
                raise ValueError(
                    f"OSFT: the singular values of {name} are not those that the run to resume started with (largest "
                    f"{float(now[0]):.6g} now, {'none' if then is None else f'{float(then[0]):.6g}'} then), so other directions "
                    f"would be preserved. Resume from the model that the run started from, or start a new run."
                )

    def end_task(self, run: Run) -> None:
        """Drop the directions: the next task has its own."""
        self._weights, self._factors = {}, {}

    def release(self) -> None:
        """Drop the directions."""
        self._weights, self._factors = {}, {}


def _shared(run: Run, weight: Tensor, rank: int, which: int) -> Subspace:
    """Decompose a weight on one process, and give the result to all: they must agree in every bit."""
    number, place = run.place
    if number == 1:
        return top_subspace(weight.to(run.device), rank)
    rows, columns = weight.shape
    # Weights that will be sharded may be complete on process 0 only.
    if place == (0 if run.is_sharded else which % number):
        space = top_subspace(weight.to(run.device), rank)
    else:
        U_OR, s_R, V_IR = (torch.zeros(size, device=run.device) for size in ((rows, rank), (rank,), (columns, rank)))
        space = Subspace(U_OR, s_R, V_IR)
    return Subspace(run.sum(space.U_OR), run.sum(space.s_R), run.sum(space.V_IR))
