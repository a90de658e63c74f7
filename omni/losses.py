"""Losses that more than one stage uses, as sums over targets; the loop divides by the targets of the whole step."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from omni.models.thinker import Thinker
from omni.tokenizer import IGNORE


def next_token_loss_sum(thinker: Thinker, final_BTD: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropy of ``labels_BT`` given the states *at the same positions* (labels are already shifted).

    Logits are computed only where there is a label, since most positions of a multimodal chat have none.
    """
    wanted = labels_BT != IGNORE
    logits = thinker.logits(final_BTD[wanted])
    return F.cross_entropy(logits.float(), labels_BT[wanted], reduction="sum")


def next_token_losses(thinker: Thinker, final_BTD: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Cross-entropy [B, T] at every position, for text in which every position has a label."""
    logits = thinker.logits(final_BTD.flatten(0, 1)).float()
    return F.cross_entropy(logits, labels_BT.flatten(), reduction="none").view_as(labels_BT)


def contrastive_loss_sum(
    image_BE: torch.Tensor, text_NE: torch.Tensor, scale: torch.Tensor, same_BN: torch.Tensor
) -> torch.Tensor:
    """Symmetric InfoNCE (Radford et al., 2021) summed over images and over texts, halved.

    Args:
        image_BE: unit image embeddings.
        text_NE: unit text embeddings; the first B belong to the images, further ones are hard negatives.
        scale: inverse temperature.
        same_BN: True where text n describes image i as well (duplicates); such pairs count as neither.
    """
    B, N = same_BN.shape
    with torch.autocast(image_BE.device.type, enabled=False):  # times a scale of 100, bf16 would err by 0.4
        logits_BN = scale.float() * image_BE.float() @ text_NE.float().T
    others = same_BN & ~torch.eye(B, N, dtype=torch.bool, device=same_BN.device)
    targets = torch.arange(B, device=image_BE.device)
    logits_BN = logits_BN.masked_fill(others, float("-inf"))
    by_image = F.cross_entropy(logits_BN, targets, reduction="sum")
    by_text = F.cross_entropy(logits_BN[:, :B].T, targets, reduction="sum")
    return (by_image + by_text) / 2
