"""Cross-entropy in pieces, for logits that are too large to be handled at once."""

import torch
import torch.nn.functional as F


def chunked_cross_entropy(
    logits: torch.Tensor | list[torch.Tensor], targets: torch.Tensor, chunk_size: int = 128, ignore_index: int = -100
) -> torch.Tensor:
    """Mean cross-entropy over the targets that are not ignored, computed a few rows at a time to bound memory.

    Args:
        logits: `(B, T, V)`, or a list of such tensors that split T, as `GPT(..., lm_head_chunk_size=n)` returns them.
        targets: `(B, T)` token ids, already shifted.
        chunk_size: Rows of the flattened logits per piece; 0 computes all of them (or each given tensor) at once.
        ignore_index: Targets of this value do not count.

    Returns:
        A scalar. Where every target is ignored it is nan for undivided logits with `chunk_size` 0 (as in
        `torch.nn.functional.cross_entropy`), else 0.
    """
    if isinstance(logits, torch.Tensor):
        if chunk_size == 0:
            return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=ignore_index)
        logits = [logits]
    target_parts = targets.split([part.size(1) for part in logits], dim=1)
    total = torch.zeros((), dtype=torch.float32, device=targets.device)
    for part, part_targets in zip(logits, target_parts, strict=True):
        rows, labels = part.flatten(0, -2), part_targets.flatten()
        size = chunk_size or max(rows.size(0), 1)
        for row_chunk, label_chunk in zip(rows.split(size), labels.split(size), strict=True):
            total = total + F.cross_entropy(row_chunk, label_chunk, ignore_index=ignore_index, reduction="sum")
    n_targets = (targets != ignore_index).sum()
    return (total / n_targets.clamp(min=1)).to(logits[0].dtype)
