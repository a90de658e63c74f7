"""Answers, token by token: batched decoding with a KV cache, greedy or sampled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from omni.data.dialogue import ChatBatch, Encoded, collate_chats
from omni.features import FeatureStore
from omni.models.layers import KVCache
from omni.models.omni import OmniModel
from omni.models.thinker import Thinker
from omni.sampling import GREEDY, Chances, Sampling, choose
from omni.tokenizer import Tokenizer


@torch.no_grad()
def stream_tokens(
    thinker: Thinker,
    embeddings_BTD: torch.Tensor,
    valid_BT: torch.Tensor,
    end_id: int,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
) -> Iterator[torch.Tensor]:
    """Yield the next token of every row, [B], until all have ended.

    Args:
        thinker: the Thinker.
        embeddings_BTD: prompts, padded on the left.
        valid_BT: False at padding; padding is neither attended to nor counted in positions.
        end_id: the token that ends a row; an ended row goes on yielding it.
        max_new_tokens: most tokens to yield; the context length bounds it as well.
        sampling: how tokens are drawn; a row draws what it would draw alone.
    """
    B, T, _ = embeddings_BTD.shape
    device = embeddings_BTD.device
    chances = Chances(sampling, [0] * B)
    cache = KVCache(thinker.config.num_layers)
    positions_BT = (valid_BT.cumsum(1) - 1).clamp(min=0)
    # a padding query attends to itself, so that no row of the softmax is empty
    triangle = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    mask = (triangle & valid_BT[:, None, :]) | torch.eye(T, dtype=torch.bool, device=device)
    states = thinker(embeddings_BTD, positions_BT, mask[:, None], cache).final_BTD[:, -1]
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    keys_BT, next_position_B1 = valid_BT, positions_BT[:, -1:] + 1
    for _ in range(min(max_new_tokens, thinker.config.ctx_len - T)):
        token = choose(thinker.logits(states), sampling, chances.next(B))
        token = torch.where(ended, torch.full_like(token, end_id), token)
        ended = ended | (token == end_id)
        yield token
        if bool(ended.all()):
            return
        keys_BT = torch.cat([keys_BT, torch.ones(B, 1, dtype=torch.bool, device=device)], dim=1)
        x = thinker.embed(token[:, None])
        states = thinker(x, next_position_B1, keys_BT[:, None, None, :], cache).final_BTD[:, -1]
        next_position_B1 = next_position_B1 + 1


def answer(
    model: OmniModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Encoded],
    features: FeatureStore,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    batch_size: int = 64,
) -> list[str]:
    """Answers to encoded prompts (:meth:`omni.data.dialogue.ChatEncoder.prompt`), batched by length."""
    device = model.thinker.embed_tokens.weight.device
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].tokens))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = collate_chats(
            [prompts[row] for row in rows], features.image, features.audio, tokenizer.pad_id, left=True
        ).to(device)
        steps = stream_tokens(
            model.thinker, embed_batch(model, batch), batch.valid_BT, tokenizer.end_id, max_new_tokens, sampling
        )
        tokens_BT = torch.stack(list(steps), dim=1).tolist()
        for row, tokens in zip(rows, tokens_BT, strict=True):
            kept = tokens[: tokens.index(tokenizer.end_id)] if tokenizer.end_id in tokens else tokens
            answers[row] = tokenizer.decode(kept).strip()
    return answers


@torch.no_grad()
def embed_batch(model: OmniModel, batch: ChatBatch) -> torch.Tensor:
    """Embeddings of a batch of prompts."""
    heard_NSD = model.project_audio(batch.states_NTD)
    return model.embed(batch.tokens_BT, batch.patches_NPD, heard_NSD, batch.positions_N)
