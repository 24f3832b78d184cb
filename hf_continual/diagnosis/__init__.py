"""Is what was forgotten gone? A diagnosis of two checkpoints (Zheng et al., ICLR 2025, arXiv 2501.13453)."""

from hf_continual.diagnosis.examination import diagnose
from hf_continual.diagnosis.result import Diagnosis

__all__ = ["Diagnosis", "diagnose"]
