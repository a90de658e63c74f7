"""The CTC loss of the audio encoder and of the projected recordings."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def ctc_sum(
    log_probs_NSV: torch.Tensor, targets_NT: torch.Tensor, num_steps_N: torch.Tensor, num_targets_N: torch.Tensor
) -> torch.Tensor:
    """CTC loss (Graves et al., 2006) summed over the batch; symbol 0 is the blank.

    CUDA's gradient of it adds up in any order. Where a run shall repeat bit for bit, it is computed on the CPU.
    """
    device = torch.device("cpu") if torch.are_deterministic_algorithms_enabled() else log_probs_NSV.device
    return F.ctc_loss(
        log_probs_NSV.transpose(0, 1).to(device),
        targets_NT.to(device),
        num_steps_N.to(device),
        num_targets_N.to(device),
        blank=0,
        reduction="sum",
    ).to(log_probs_NSV.device)
