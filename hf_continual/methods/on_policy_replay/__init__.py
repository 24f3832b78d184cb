"""On-policy replay: the method and what it does with answers."""

from __future__ import annotations

from hf_continual.methods.on_policy_replay.answers import best
from hf_continual.methods.on_policy_replay.method import OnPolicyReplay

__all__ = ["OnPolicyReplay", "best"]
