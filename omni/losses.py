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


def contrastive_loss_sum(
    image_BE: torch.Tensor, text_NE: torch.Tensor, scale: torch.Tensor, same_BB: torch.Tensor
) -> torch.Tensor:
    """Symmetric InfoNCE (Radford et al., 2021) summed over images and over texts, halved.

    Args:
        image_BE: unit image embeddings.
        text_NE: unit text embeddings; the first B belong to the images, further ones are hard negatives.
        scale: inverse temperature.
        same_BB: True where image i is described by caption j as well (duplicates); such pairs count as neither.
    """
    B = image_BE.shape[0]
    logits_BN = scale * image_BE @ text_NE.T
    others = same_BB & ~torch.eye(B, dtype=torch.bool, device=same_BB.device)
    blocked = F.pad(others, (0, logits_BN.shape[1] - B))
    targets = torch.arange(B, device=image_BE.device)
    by_image = F.cross_entropy(logits_BN.masked_fill(blocked, float("-inf")), targets, reduction="sum")
    by_text = F.cross_entropy(logits_BN[:, :B].T.masked_fill(others.T, float("-inf")), targets, reduction="sum")
    return (by_image + by_text) / 2
