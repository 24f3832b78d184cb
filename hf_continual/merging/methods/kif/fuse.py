"""`kif_fuse`; see `hf_continual.merging.methods.kif.method`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from hf_continual.merging.methods.kif.method import Importance, Kif, PathLike, Rows
from hf_continual.merging.pipeline import merge_by

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hf_continual.merging.engine.options import OutputOptions
    from hf_continual.merging.engine.result import MergeResult
    from hf_continual.merging.methods.kif.rule import FuseRule
    from hf_continual.tensors.importance import Order, Scope


def kif_fuse(
    base: PathLike,
    new: PathLike,
    output_dir: PathLike,
    *,
    old: PathLike | None = None,
    importance: Importance = None,
    calibration_new: Rows | None = None,
    calibration_old: Rows | None = None,
    rule: FuseRule = "code",
    top_share: float = 0.2,
    scope: Scope = "global",
    temperature: float = 1.0,
    uncertainty: bool | None = None,
    old_from: Literal["base", "new"] = "base",
    base_model: PathLike | None = None,
    beta1: float = 0.85,
    beta2: float = 0.85,
    order: Order = "first",
    batch_size: int = 8,
    max_length: int = 1024,
    device: str | None = None,
    calibration_dtype: str | None = None,
    **output: Unpack[OutputOptions],
) -> MergeResult:
    """Fuse two full models, or two LoRA adapters, by what matters to each, without loading either.

    Weights and scores are read in chunks: memory is bounded, whatever their size (the plan of ``dry_run=True`` states
    it). Scores are read three times, twice to find the exact threshold. Calibration is not bounded: it holds the model,
    its gradients and two float32 values per weight.

    Example:
        >>> kif_fuse("base", "law", "both", old="tax", calibration_new=law_rows, calibration_old=tax_rows)
        >>> kif_fuse("earlier", "run/checkpoint-20", "fused", importance="run/checkpoint-20")

    Args:
        base: Model that both changes are measured from: a full model, or the adapter that both adapters continued from.
        new: Model that learned the new task; full models and adapters cannot be mixed.
        output_dir: Output folder; complete or absent.
        old: Model that learned the old tasks. None: it equals the base, so old tasks only affect the masks, as in
            the authors' runs with LLaMA.
        importance: A checkpoint of a run with `KIF` (``checkpoint-N``) for both sides; or one per side, as a pair or by
            ``"new"`` and ``"old"``, a checkpoint or a safetensors file of scores.
        calibration_new: Rows of the new task, in any form that `KIF` accepts for its memory. The gradients of `new` on them
            give the importance; takes precedence over `importance`.
        calibration_old: Rows of old tasks, for the gradients of `old`, or of the base if there is no `old`.
        rule: ``"code"``, ``"paper"``, ``"no_shared"``, ``"adaptive"`` or ``"weighted"``, as in `KIF`.
        top_share: Fraction of the elements that count as important to a side.
        scope: One threshold (or weight, for ``"weighted"``) over all scored tensors, or one for each.
        temperature: Temperature of ``rule="adaptive"``.
        uncertainty: Multiply importance by its uncertainty; None: if the scores have one.
        old_from: What `old` was trained from: the base, or `new` (as a round of `KIF`: the task, then the memory).
        base_model: The full model that the adapters belong to, for calibration; None: the one that their configuration names.
        beta1: Decay of the importance, over batches of calibration.
        beta2: Decay of its uncertainty.
        order: Taylor terms of the sensitivity.
        batch_size: Rows per batch of calibration.
        max_length: Tokens per row of calibration.
        device: Where models run for calibration; None: the accelerator if there is one.
        calibration_dtype: dtype they run in; None: the checkpoint's, on a CPU never float16.
        **output: How it is written, see `OutputOptions`. The result is of the same kind as the inputs.

    Returns:
        Where the result is; the report (``kif_report.json``) states how many elements went to which side.

    Raises:
        ValueError: If an argument does not fit.
        MergeError: If the models or the scores do not fit, or a file changes meanwhile.
        FileExistsError: If the output folder is in use.
        OSError: If the disk is full.
    """
    method = Kif(
        importance, calibration_new, calibration_old, rule, top_share, scope, temperature, uncertainty, old_from, base_model,
        beta1, beta2, order, batch_size, max_length, device, calibration_dtype,
    )  # fmt: skip
    return merge_by(method, [new] if old is None else [old, new], output_dir, base=base, **output)
