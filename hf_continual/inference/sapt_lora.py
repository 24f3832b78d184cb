"""A LoRA pair per task, mixed for each row by attention over keys (SAPT, Zhao et al., ACL 2024, arXiv:2401.08295).

    q = LayerNorm(SiLU(W_2 W_1 max_s E[x_s])),  max over the tokens of the question
    w = softmax(K q / sqrt(D)),                 K the keys of the tasks so far, K_t trained with task t
    y = W x + alpha / r  sum_i w_i B_i A_i x    in every adapted layer, pairs of earlier tasks frozen

One w per row: computed from the question in the first pass, and kept for the tokens that are generated.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from torch.nn import functional

from hf_continual.inference.base import KindConfig, KindTuner, question_mask
from hf_continual.inference.names import SAPT_LORA
from hf_continual.tensors.rank_gates import check_not_spread, gated_layers, weigh_ranks
from hf_continual.tensors.shared_attention import attention, pooled, query, reflection_loss
from hf_continual.tensors.whole import whole

ATTENTION, EARLIER = "lora_attention", "lora_earlier"


@dataclass
class SaptLoraConfig(KindConfig, LoraConfig):  # pyrefly: ignore[inconsistent-inheritance]
    """LoRA with a pair of factors per task.

    Args:
        hidden: H, inner width of the query.
        tasks: Names of the tasks learned so far, in order; each has a pair of rank `r` in every adapted layer.
    """

    hidden: int = 100
    tasks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SAPT_LORA  # pyrefly: ignore[bad-assignment]


class SharedAttention(nn.Module):
    """The query, which all tasks share and train, and the keys, of which the last is trained.

    Args:
        width: D, of the embeddings.
        hidden: H.
        tasks: T, number of keys.
        device: Where it lives.
    """

    def __init__(self, width: int, hidden: int, tasks: int, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden, bias=False, device=device, dtype=torch.float32)
        self.up = nn.Linear(hidden, width, bias=False, device=device, dtype=torch.float32)
        self.norm = nn.LayerNorm(width, device=device, dtype=torch.float32)
        self.keys = nn.ParameterList()
        for _ in range(tasks):
            self.add_key()

    @property
    def width(self) -> int:
        """D."""
        return self.down.in_features

    def add_key(self) -> None:
        """Draw the key of a further task from torch's generator."""
        like = self.down.weight
        self.keys.append(nn.Parameter(torch.randn(like.shape[1]).to(like.device, like.dtype)))

    def forward(self, pooled_BD: Tensor) -> Tensor:
        """Weight of each task's pair, (B, T), in float32."""
        # Not under autocast: training and inference must weigh alike.
        with torch.autocast(pooled_BD.device.type, enabled=False):
            own = (self.down.weight, self.up.weight, self.norm.weight, self.norm.bias)
            query_BD = query(pooled_BD.float(), *(whole(p).float() for p in own))
            return attention(query_BD, torch.stack([whole(key).float() for key in self.keys]))


class EarlierPairs(nn.Module):
    """The frozen pairs of a layer, A one below the other and B side by side, as a hook that adds what they say.

    Args:
        layer: The layer.
        name: Of the adapter.
        tuner: What it hangs on; knows the weights.
        pairs: Number of pairs.
    """

    tuner: SaptLoraTuner
    layer: Any
    name: str

    def __init__(self, layer: Any, name: str, tuner: SaptLoraTuner, pairs: int) -> None:
        super().__init__()
        a, b = self._factors(layer, name)
        self.__dict__.update(tuner=tuner, layer=layer, name=name)  # not modules below this one
        self.rank = a.shape[0]
        A_RD, B_OR = torch.zeros(self.rank * pairs, a.shape[1]), torch.zeros(b.shape[0], self.rank * pairs)
        # A parameter without an element cannot be saved under FSDP2.
        self.A = nn.Parameter(A_RD.to(a.device), requires_grad=False) if pairs else None
        self.B = nn.Parameter(B_OR.to(b.device), requires_grad=False) if pairs else None

    @staticmethod
    def _factors(layer: Any, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        return layer.lora_A[name].weight, layer.lora_B[name].weight

    @torch.no_grad()
    def freeze_pair(self) -> None:
        """Put the pair that was trained last to the frozen ones, and begin a new one."""
        a, b = self._factors(self.layer, self.name)
        A_RD, B_OR = a.float(), b.float()
        if self.A is not None and self.B is not None:
            A_RD, B_OR = torch.cat([self.A.to(a.device), A_RD]), torch.cat([self.B.to(b.device), B_OR], dim=1)
        self.A = nn.Parameter(A_RD.clone(), requires_grad=False)
        self.B = nn.Parameter(B_OR.clone(), requires_grad=False)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.zeros_(b)

    def weigh_new(self, factor: nn.Module, args: tuple[Tensor, ...], inner: Tensor) -> Tensor:
        """Forward hook of factor A of the newest pair."""
        return weigh_ranks(inner, self.tuner.weights(inner)[:, -1:], [self.rank])

    def add(self, layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Forward hook of the layer: add what the earlier pairs say."""
        if self.A is None or self.B is None or layer.disable_adapters:
            return output
        pairs = self.A.shape[0] // self.rank
        x = args[0].to(self.A.dtype)
        weights_BT = self.tuner.weights(x)[:, :-1]
        inner = weigh_ranks(functional.linear(x, self.A), weights_BT, [self.rank] * pairs)
        return output + (functional.linear(inner, self.B) * layer.scaling[self.name]).to(output.dtype)


class SaptLoraTuner(KindTuner, LoraModel):
    """Puts a pair per task onto the linear layers of a model, and the attention that mixes them onto its body.

    Attributes:
        reflection: Pooled rows (M, D) of each earlier task with its label (T,); in training, their loss is computed with
            every forward pass.
        reflected: That loss of the last forward pass, summed over the tasks.
    """

    prefix: str = "lora_"

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put pairs, query and keys onto the model.

        Args:
            model: The base model.
            adapter_name: Under which PEFT keeps them.
            *args: PEFT's.
            **kwargs: PEFT's.

        Raises:
            ValueError: If the model carries such pairs, or layers are of a kind that cannot be weighted.
        """
        config: Any = self.peft_config[adapter_name]
        if len(self.peft_config) > 1:
            raise ValueError(
                "The model carries pairs of SAPT-LoRA, and can carry one set. Train those further, or load the base."
            )
        check_not_spread(model, "SAPTLoRA")
        self.check_base(config, model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        body: Any = getattr(model, "base_model", None)
        embeddings_VD = model.get_input_embeddings().weight  # pyrefly: ignore[not-callable]
        self.reflection: list[tuple[Tensor, Tensor]] = []
        self.reflected: Tensor | None = None
        self._weights_BT: Tensor | None = None
        tasks = max(len(config.tasks), 1)
        shared = SharedAttention(embeddings_VD.shape[1], config.hidden, tasks, embeddings_VD.device)
        self.add_module(
            ATTENTION, nn.ModuleDict({adapter_name: shared})
        )  # PEFT saves what a tuner holds for all layers
        self.pairs: dict[str, EarlierPairs] = {}
        for name, layer in gated_layers(model, adapter_name, "SAPTLoRA").items():
            self.pairs[name] = pairs = EarlierPairs(layer, adapter_name, self, tasks - 1)
            layer.add_module(EARLIER, nn.ModuleDict({adapter_name: pairs}))
            layer.lora_A[adapter_name].register_forward_hook(pairs.weigh_new)
            layer.register_forward_hook(pairs.add)
        body.register_forward_pre_hook(self._attend, with_kwargs=True)
        shared.requires_grad_(not config.inference_mode)
        self._freeze_earlier()

    @property
    def shared(self) -> SharedAttention:
        """Query and keys."""
        name = self.active_adapter if isinstance(self.active_adapter, str) else self.active_adapter[0]
        return getattr(self, ATTENTION)[name]

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks learned so far."""
        config: Any = self.active_config
        return config.tasks

    def _freeze_earlier(self) -> None:
        for key in list(self.shared.keys)[:-1]:
            key.requires_grad_(False)

    def learn_task(self, name: str) -> None:
        """Begin a task: the pair and the key trained last are frozen, and new ones drawn from torch's generator.

        Args:
            name: Its name; the last task's own trains that further.

        Raises:
            ValueError: If the task was learned before the last.
        """
        if name in self.tasks[:-1]:
            raise ValueError(
                f"SAPTLoRA learned the task {name!r} before {self.tasks[-1]!r}, and its pair is frozen. Give the task another "
                f"name (ContinualConfig(task_name=...)), and it gets its own pair."
            )
        if self.tasks and name != self.tasks[-1]:
            for pairs in self.pairs.values():
                pairs.freeze_pair()
            self.shared.add_key()
            self._freeze_earlier()
        if name not in self.tasks:
            self.tasks.append(name)

    def _attend(self, body: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the body: weigh the pairs for new rows; rows that are continued keep theirs."""
        given = {**dict(zip(inspect.signature(body.forward).parameters, args, strict=False)), **kwargs}
        cache = given.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            return
        embeds_BSD = given.get("inputs_embeds")
        if embeds_BSD is None:
            embeds_BSD = body.get_input_embeddings()(given["input_ids"])
        mask = given.get("attention_mask") if self.asked_BS is None else self.asked_BS
        if isinstance(mask, dict) or (mask is not None and mask.dim() != 2):
            raise ValueError(
                "SAPT-LoRA reads the question from the attention mask, and this one was made for a cache of fixed size. Generate "
                "with the default cache (cache_implementation='dynamic')."
            )
        shared = self.shared
        self._weights_BT = shared(pooled(embeds_BSD, None if mask is None else mask.to(embeds_BSD.device)))
        self.reflected = None
        if body.training and self.reflection:
            self.reflected = torch.stack([reflection_loss(shared(x), label) for x, label in self.reflection]).sum()

    @torch.no_grad()
    def pool(self, batch: Mapping[str, Any]) -> Tensor:
        """What the attention reads of rows, (B, D), without a forward pass.

        Args:
            batch: Collated rows with labels.

        Returns:
            See `pooled`.
        """
        embedding: Any = self.model.get_input_embeddings()  # pyrefly: ignore[not-callable]
        values = {name: whole(p) for name, p in embedding.named_parameters()}
        embeds_BSD = torch.func.functional_call(embedding, values, (batch["input_ids"],))
        return pooled(embeds_BSD, question_mask(batch["labels"], batch.get("attention_mask")))

    def weights(self, x: Tensor) -> Tensor:
        """The weights of the batch, (B, T), as the first pass over its rows left them.

        Args:
            x: What a layer sees, (B, S, D).

        Returns:
            The weights.

        Raises:
            ValueError: If they are those of another number of rows.
        """
        found = self._weights_BT
        if found is None or (x.dim() == 3 and len(found) != len(x)):
            raise ValueError(
                f"SAPT-LoRA weighed {0 if found is None else len(found)} rows in the first pass over their questions, and {len(x)} are "
                f"continued. Give whole rows (without past_key_values), or say which rows continue: "
                f"hf_continual.inference.kinds.keep_rows."
            )
        return found

    def keep_rows(self, index_N: Tensor) -> None:
        """Keep the weights of the rows of the batch that continue."""
        if self._weights_BT is not None:
            self._weights_BT = self._weights_BT[index_N]
