"""TRL's functions on rows, imported once its version is checked."""

from hf_continual.versions import check_trl

check_trl()

from trl.data_utils import (  # noqa: E402 - only now
    common_prefix_length,
    is_conversational,
    is_conversational_from_value,
    maybe_convert_to_chatml,
)

__all__ = ["common_prefix_length", "is_conversational", "is_conversational_from_value", "maybe_convert_to_chatml"]
