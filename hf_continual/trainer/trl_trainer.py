"""TRL's trainer and its parts, imported once its version is checked."""

from hf_continual.versions import check_trl

check_trl()

from trl import SFTConfig, SFTTrainer  # noqa: E402 - only now
from trl.trainer.utils import (  # noqa: E402
    FusedCausalLMOutput,
    create_model_from_path,
    get_comet_experiment_url,
    get_trackio_space_url,
)

__all__ = [
    "FusedCausalLMOutput",
    "SFTConfig",
    "SFTTrainer",
    "create_model_from_path",
    "get_comet_experiment_url",
    "get_trackio_space_url",
]
