"""Recurrent-KIF (ACL 2025): `method` is the class, `two_sides` both learners' state and its fusion, `flat_adam` the
outer learner's optimizer. Importance and fusion, also used by merges, are in `hf_continual.tensors`.
"""

from hf_continual.methods.kif.method import KIF, PUBLISHED
from hf_continual.tensors.fusion import fuse
from hf_continual.tensors.importance import top_share_masks, update_importance_

__all__ = ["KIF", "PUBLISHED", "fuse", "top_share_masks", "update_importance_"]
