"""The names that a method is written with; the protocol itself is `hf_continual.merging.protocol`."""

from hf_continual.merging.engine.rules import Rule, Rules, weights_of
from hf_continual.merging.protocol import MergeMethod, Models

__all__ = ["MergeMethod", "Models", "Rule", "Rules", "weights_of"]
