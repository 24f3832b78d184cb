"""GeRe (2025): `method` is the class, `ternary` and `margin` the maths, `states` and `base_states` the recorded states."""

from hf_continual.methods.gere.margin import tm_loss
from hf_continual.methods.gere.method import GeRe
from hf_continual.methods.gere.ternary import activation_states, hidden_statistics
from hf_continual.tensors.imitation import imitation, mixed_ce

__all__ = ["GeRe", "activation_states", "hidden_statistics", "imitation", "mixed_ce", "tm_loss"]
