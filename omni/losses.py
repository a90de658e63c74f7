"""Losses that more than one stage uses, as sums over targets; the loop divides by the targets of the whole step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from omni import ranks
from omni.models.layers import check_finite
from omni.models.thinker import Thinker
from omni.tokenizer import IGNORE

_CHUNK = 2**20  # logits at a time: 4 MB in fp32 stay in the CPU's cache, and a GPU is busy with them


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of linear logits in chunks of rows; backward computes the logits of a chunk once more."""

    @staticmethod
    def forward(ctx: Any, x_ND: torch.Tensor, weight_VD: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        rows = max(1, _CHUNK // len(weight_VD))
        weight = weight_VD.to(x_ND.dtype)
        totals, chosen = [], []
        for x, labels in zip(x_ND.split(rows), labels_N.split(rows), strict=True):
            logits = (x @ weight.T).float()
            totals.append(logits.logsumexp(1))
            chosen.append(logits.gather(1, labels.clamp(min=0)[:, None])[:, 0])
        total_N = torch.cat(totals) if totals else x_ND.new_zeros(0, dtype=torch.float32)
        check_finite(total_N, "the Thinker's logits")
        ctx.save_for_backward(x_ND, weight_VD, labels_N, total_N)
        nats_N = total_N - torch.cat(chosen) if chosen else total_N
        return nats_N.masked_fill(labels_N == IGNORE, 0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x_ND, weight_VD, labels_N, total_N = ctx.saved_tensors
        rows = max(1, _CHUNK // len(weight_VD))
        weight = weight_VD.to(x_ND.dtype)
        grad_x, grad_weight = torch.empty_like(x_ND), torch.zeros_like(weight_VD)
        factor_N = grads[0].masked_fill(labels_N == IGNORE, 0)
        for start in range(0, len(x_ND), rows):
            part = slice(start, start + rows)
            share = (x_ND[part] @ weight.T).float().sub_(total_N[part, None]).exp_()
            share.scatter_add_(1, labels_N[part, None].clamp(min=0), share.new_full((len(share), 1), -1.0))
            grad = share.mul_(factor_N[part, None]).to(x_ND.dtype)
            grad_x[part] = grad @ weight
            grad_weight += grad.T @ x_ND[part]
        return grad_x, grad_weight, None


def linear_cross_entropy(x_ND: torch.Tensor, weight_VD: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Cross-entropy [N] of ``labels_N`` under the logits ``x_ND @ weight_VD.T``, which are never held all at once.

    A vocabulary is much wider than a model, so that its logits would need most of a step's memory; and they are read
    from the cache here: at 4,096 x 2,048 on two cores 1.5 times as fast as ``F.cross_entropy``. 0 where the label is
    IGNORE.

    Raises:
        FloatingPointError: when logits are not finite; the training loop skips such a batch.
    """
    if torch.is_autocast_enabled(x_ND.device.type):
        x_ND = x_ND.to(torch.get_autocast_dtype(x_ND.device.type))
    nats_N: torch.Tensor = _LinearCrossEntropy.apply(x_ND, weight_VD, labels_N)
    return nats_N


def next_token_loss_sum(thinker: Thinker, final_BTD: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropy of ``labels_BT`` given the states *at the same positions* (labels are already shifted).

    Only positions with a label are looked at, since most of a multimodal chat have none.
    """
    wanted = labels_BT != IGNORE
    return linear_cross_entropy(final_BTD[wanted], thinker.embed_tokens.weight, labels_BT[wanted]).sum()


def next_token_losses(thinker: Thinker, final_BTD: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Cross-entropy [B, T] at every position, for text in which nearly every position has a label; 0 at the others."""
    nats_N = linear_cross_entropy(final_BTD.flatten(0, 1), thinker.embed_tokens.weight, labels_BT.flatten())
    return nats_N.view_as(labels_BT)


@dataclass
class Pairs:
    """What a contrastive loss compares: pictures and texts of the whole batch.

    Attributes:
        image_BE: unit image embeddings.
        text_NE: unit text embeddings; the first B belong to the images, further ones are hard negatives.
        same_BN: True where text n describes image i as well (duplicates).
        mine: which of the images are this rank's; None: all.
    """

    image_BE: torch.Tensor
    text_NE: torch.Tensor
    same_BN: torch.Tensor
    mine: torch.Tensor | None = None


def pairs_of_all_ranks(
    image_BE: torch.Tensor, text_NE: torch.Tensor, same_BN: torch.Tensor, tokens_NT: torch.Tensor
) -> Pairs:
    """Join this rank's pictures and texts with the other ranks'; a text is known by its tokens, padded with zeros."""
    if ranks.size() == 1:
        return Pairs(image_BE, text_NE, same_BN)
    B, whole = len(image_BE), ranks.whole_batch
    width = max(ranks.gather("the width of the texts", tokens_NT.shape[1]))
    tokens_NT = F.pad(tokens_NT, (0, width - tokens_NT.shape[1]))
    numbers_B = torch.full((B,), ranks.rank(), device=image_BE.device)
    # the captions in the order of the pictures, the negatives behind them
    text_NE, tokens_NT = (torch.cat([whole(x[:B]), whole(x[B:])]) for x in (text_NE, tokens_NT))
    image_BE, mine = whole(image_BE), (whole(numbers_B) == ranks.rank()).nonzero()[:, 0]
    same_BN = (tokens_NT[: len(image_BE), None] == tokens_NT[None]).all(-1)
    return Pairs(image_BE, text_NE, same_BN, mine)


def contrastive_loss_sum(
    image_BE: torch.Tensor,
    text_NE: torch.Tensor,
    scale: torch.Tensor,
    same_BN: torch.Tensor,
    mine: torch.Tensor | None = None,
) -> torch.Tensor:
    """Symmetric InfoNCE (Radford et al., 2021) summed over images and over texts, halved.

    Args:
        image_BE: unit image embeddings.
        text_NE: unit text embeddings; the first B belong to the images, further ones are hard negatives.
        scale: inverse temperature.
        same_BN: True where text n describes image i as well (duplicates); such pairs count as neither.
        mine: the images, and their texts, that are summed over; None: all.
    """
    B, N = same_BN.shape
    with torch.autocast(image_BE.device.type, enabled=False):  # times a scale of 100, bf16 would err by 0.4
        logits_BN = scale.float() * image_BE.float() @ text_NE.float().T
    others = same_BN & ~torch.eye(B, N, dtype=torch.bool, device=same_BN.device)
    targets = torch.arange(B, device=image_BE.device)
    logits_BN = logits_BN.masked_fill(others, float("-inf"))
    by_image, by_text = logits_BN, logits_BN[:, :B].T
    if mine is not None:
        by_image, by_text, targets = by_image[mine], by_text[mine], targets[mine]
    by_image = F.cross_entropy(by_image, targets, reduction="sum")
    by_text = F.cross_entropy(by_text, targets, reduction="sum")
    return (by_image + by_text) / 2
