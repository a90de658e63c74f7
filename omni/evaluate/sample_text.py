"""Stage A, to be read: how the Thinker goes on where a held-out text was cut."""

from __future__ import annotations

import torch

from omni.decoding import Decoding, Prompts
from omni.models.thinker import Thinker
from omni.sample import Sample
from omni.sampling import GREEDY, Sampling
from omni.tokenizer import ASSISTANT, Tokenizer

_NEW_TOKENS = 40
_SAMPLED = Sampling(temperature=0.8, top_p=0.95)


def continue_texts(thinker: Thinker, tokenizer: Tokenizer, text: str, count: int) -> list[Sample]:
    """Continuations of the first documents of a text: of chats the last answer, of other texts the second half.

    Args:
        thinker: in evaluation mode.
        tokenizer: its own.
        text: documents that blank lines part, or lines where there are no blank lines.
        count: chats, and as many other documents.
    """
    documents = [part.strip("\n") for part in text.split("\n\n") if part.strip()]
    if len(documents) < 2:
        documents = [line for line in text.splitlines() if line.strip()]
    chats = [document for document in documents if ASSISTANT in document]
    others = [document for document in documents if ASSISTANT not in document and len(document.split()) > 5]
    return [_continue(thinker, tokenizer, document) for document in [*chats[:count], *others[:count]]]


def _continue(thinker: Thinker, tokenizer: Tokenizer, document: str) -> Sample:
    tokens = tokenizer.encode(document)
    mark = tokenizer.special[ASSISTANT]
    is_chat = mark in tokens
    cut = len(tokens) - tokens[::-1].index(mark) if is_chat else _between_words(tokenizer, tokens)
    prompt = tokens[:cut][-(thinker.config.ctx_len - _NEW_TOKENS) :]
    true = tokens[cut : cut + _NEW_TOKENS]
    greedy, sampled = (_write(thinker, tokenizer, prompt, sampling) for sampling in (GREEDY, _SAMPLED))
    return Sample(
        "an answer to a held-out question" if is_chat else "a held-out text, continued",
        (
            ("given", tokenizer.decode(prompt[-160:])),
            ("goes on in truth", tokenizer.decode(true).strip()),
            ("sampled, temperature 0.8", sampled),
            ("most probable", greedy),
        ),
        right=greedy == tokenizer.decode([token for token in true if token != tokenizer.end_id]).strip()
        if is_chat
        else None,
    )


def _between_words(tokenizer: Tokenizer, tokens: list[int]) -> int:
    """The first place in the second half where a word begins."""
    half = len(tokens) // 2
    begins = (at for at in range(half, len(tokens)) if tokenizer.bytes_of(tokens[at]).startswith(b" "))
    return next(begins, half)


def _write(thinker: Thinker, tokenizer: Tokenizer, prompt: list[int], sampling: Sampling) -> str:
    """What comes after a prompt, up to the mark that ends a turn."""
    tokens_1T = torch.tensor([prompt], device=thinker.embed_tokens.weight.device)
    prompts = Prompts(thinker.embed(tokens_1T).detach(), torch.ones_like(tokens_1T, dtype=torch.bool))
    decoding = Decoding(thinker, prompts, sampling)
    found: list[int] = []
    for (run,) in decoding.runs(_NEW_TOKENS):
        if tokenizer.end_id in run:
            found += run[: run.index(tokenizer.end_id)]
            break
        found += run
    return tokenizer.decode(found).strip()
