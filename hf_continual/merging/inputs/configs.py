"""Whether models compute the same with their weights: configurations, compared as transformers reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hf_continual.merging.errors import MergeError
from hf_continual.merging.inputs.architecture import understood
from hf_continual.merging.inputs.members import Member

# A difference in one of these keys means that the same weights compute something else.
_DECISIVE = frozenset((
    "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head", "num_key_value_heads",
    "head_dim", "intermediate_size", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",
    "rotary_pct", "rotary_emb_base", "rotary_dim", "rope_local_base_freq", "rms_norm_eps", "layer_norm_eps",
    "layer_norm_epsilon", "norm_eps", "norm_epsilon", "hidden_act", "hidden_activation", "activation_function",
    "sliding_window", "layer_types", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar",
    "logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier", "attention_multiplier",
    "num_local_experts", "num_experts", "num_experts_per_tok", "norm_topk_prob",
))  # fmt: skip
# Differences in these keys do not matter for a merge.
_HARMLESS = frozenset(
    ("dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache", "vocab_size", "architectures")
)


def check_configs(members: Sequence[Member]) -> list[str]:
    """Compare what the models compute with their weights.

    Two files that differ literally may still mean the same, since versions of transformers write configurations differently.
    They are compared as the installed transformers reads them.

    Args:
        members: The models.

    Returns:
        Notes on differences that do not matter for the weights.

    Raises:
        MergeError: If they are different architectures, or a decisive number differs.
    """
    first, others, notes = members[0], members[1:], []
    one = first.checkpoint.config
    for other in others:
        for key in ("model_type", "architectures"):
            if one.get(key) != (two := other.checkpoint.config).get(key):
                raise MergeError(
                    f"architecture mismatch: {first.name} has {key}={one.get(key)!r} and {other.name} {two.get(key)!r}. Only "
                    f"models of one architecture can be merged, all fine-tuned from the same weights."
                )
    strange = [m for m in others if _weighed(m.checkpoint.config) != _weighed(one)]
    if not strange:
        return []
    meanings = understood([m.checkpoint.config for m in (first, *strange)])
    for other, meaning in zip(strange, meanings[1:], strict=True):
        notes += _compare(first, other, meanings[0], meaning)
    return notes


def _compare(one: Member, two: Member, first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Compare two models as transformers reads their files, or compare the files literally if it cannot read one.

    Args:
        one: A model.
        two: Another.
        first: Answer of `understood` for the first.
        second: Its answer for the second.

    Returns:
        Notes on differences that do not matter for the weights.

    Raises:
        MergeError: If a decisive number differs.
    """
    unknown = first["unknown"] or second["unknown"]
    a, b = (one.checkpoint.config, two.checkpoint.config) if unknown else (first["meaning"], second["meaning"])
    # The size of a head usually follows from other values, which explain more.
    found = sorted(_differences(a, b), key=lambda f: f[0].endswith("head_dim"))
    for key, x, y in found:
        if (last := key.rpartition(".")[2]) in _DECISIVE:
            why = (
                f" The files were compared literally ({unknown}); if they mean the same, replace the "
                f"config.json of {two.name} by that of {one.name}."
                if unknown
                else ""
            )
            raise MergeError(
                f"architecture mismatch: {key} is {x!r} in {one.name} and {y!r} in {two.name}, so the same weights "
                f"compute different things. Merge models with the same {last}.{why}"
            )
    if not unknown:  # what the model does not read: only a contradiction is noted
        c, d = first["rest"], second["rest"]
        found += [(k, c[k], d[k]) for k in sorted(c.keys() & d.keys()) if c[k] != d[k]]
    return [
        f"config.{key}: {x!r} in {one.name}, {y!r} in {two.name}; the first's is kept."
        for key, x, y in found
        if key.rpartition(".")[2] not in _HARMLESS
    ]


def _weighed(config: Any) -> Any:
    """A configuration without the values that do not matter for a merge."""
    if not isinstance(config, Mapping):
        return config
    return {k: _weighed(v) for k, v in config.items() if k not in _HARMLESS}


def _differences(one: Mapping[str, Any], two: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in sorted(one.keys() | two.keys()):
        a, b = one.get(key), two.get(key)
        if isinstance(a, dict) and isinstance(b, dict) and key not in _DECISIVE:
            yield from _differences(a, b, f"{path}{key}.")
        elif a != b:
            yield path + key, a, b
