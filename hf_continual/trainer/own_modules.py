"""Training with a method that supplies its own modules (`Method.adapter`): they are added to the model, or trained further."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import PeftConfig

from hf_continual.inference.kinds import KindConfig  # registers the kinds with PEFT
from hf_continual.trainer.adapters import CONTINUE, MERGE

if TYPE_CHECKING:
    from hf_continual.methods.base import Method
    from hf_continual.trainer.live import LiveTrainer


def config_to_add(method: Method | None, held: PeftConfig | None, where: str, asked: str | None, given: Any) -> Any:
    """The adapter that the trainer has to add.

    Args:
        method: The method of the run that supplies modules, or None.
        held: The configuration of the adapter that the model comes with, or None.
        where: The model, for messages.
        asked: `from_adapter` of the training arguments.
        given: `peft_config` as given to the trainer.

    Returns:
        The configuration of the method's modules, None if the model has them; without such a method, `given`.

    Raises:
        ValueError: If something else should be trained too, or the model's modules do not fit.
    """
    if method is None:
        if isinstance(held, KindConfig):
            raise ValueError(
                f"{where} holds {held.peft_type} modules, which the method {held.named.method!r} trains, but this run is without it. Give "
                f"it that method, with the same sizes: {_described(held)}."
            )
        return given
    name, config = type(method).__name__, method.adapter()
    if given is not None:
        raise ValueError(
            f"{name} supplies the modules that it trains, but peft_config={type(given).__name__}(...) asks for others. Drop peft_config (in "
            f"a plan: peft), or {name}."
        )
    if isinstance(held, KindConfig) and isinstance(config, KindConfig) and held.peft_type == config.peft_type:
        _check_same(name, held, config, where)
        if asked not in (None, CONTINUE):
            raise ValueError(f"from_adapter={asked!r}: {held.peft_type} modules can only be trained further. Drop it.")
        return None
    if held is not None and (asked != MERGE or isinstance(held, KindConfig)):
        way = (
            ""
            if isinstance(held, KindConfig)
            else f", or merge the adapter into its base first: from_adapter={MERGE!r}"
        )
        raise ValueError(
            f"{name} puts its own modules onto a base model, but {where} is an adapter ({held.peft_type}). Start from its base"
            f"{way}."
        )
    return config


def check_layout(trainer: LiveTrainer) -> None:
    """Refuse rows that share a sequence: modules that choose for a row could not tell them apart.

    Args:
        trainer: The trainer, set up except for its methods.

    Raises:
        ValueError: If rows are packed, or laid end to end without padding.
    """
    method: Method | None = trainer.methods.adapting
    packs = [n for n in ("packing", "padding_free") if getattr(trainer.args, n, False)]
    config = None if method is None else method.adapter()
    if packs and getattr(config, "chooses_by_row", False):
        raise ValueError(
            f"{type(method).__name__} chooses for each row, but with {packs[0]}=True several rows are one sequence. Set "
            f"{packs[0]}=False."
        )


def _check_same(name: str, held: KindConfig, config: KindConfig, where: str) -> None:
    then, now = held.sizes, config.sizes
    if lines := [f"{key} was {then[key]!r}, is {now[key]!r}" for key in then if then[key] != now[key]]:
        raise ValueError(
            f"{name}: {where} was trained with different sizes ({'; '.join(lines)}). Give {_described(held)}."
        )


def _described(held: KindConfig) -> str:
    options = ", ".join(f"{key}: {value}" for key, value in held.sizes.items())
    return f"methods: {{{held.named.method}: {{{options}}}}}"
