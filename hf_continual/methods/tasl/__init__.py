"""TaSL: `method` is the class, `consolidation` mixes two models by importance. Importance itself is in
`hf_continual.tensors.importance`.
"""

from hf_continual.methods.tasl.consolidation import accumulate, consolidate, rank_scores, scaled
from hf_continual.methods.tasl.method import TaSL

__all__ = ["TaSL", "accumulate", "consolidate", "rank_scores", "scaled"]
