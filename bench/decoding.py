"""What decoding costs, measured: teacher forcing beside steps, its backward, growing caches, guessing ahead.

    python bench/decoding.py states                    one pass over a text beside reading it token by token
    python bench/decoding.py backward                  a prompt of audio alone, and with its answer behind it
    python bench/decoding.py cache                     memory that is reserved beside keys appended by copying
    python bench/decoding.py generate                  greedy decoding beside `generate` of transformers, same weights
    python bench/decoding.py draft --size nano         answers with and without a draft (configs/draft_nano.json)

What is compared is run in turns, the median of ``--rounds`` is taken, and the ratio is of the two medians: on a machine
that does other things as well, read the ratios and not the seconds. Memory is the largest sum of all tensors alive at
once that were made while it ran; on CUDA, what torch's allocator says.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.features import spread
from omni.config import RunConfig, UserError, from_dict
from omni.console import user_errors
from omni.data.dialogue import read_chats
from omni.decoding import Decoding, Draft, Prompts, Rows
from omni.evaluate.omni import Examiner
from omni.features import FeatureStore, cache_of
from omni.generate import AnswerSettings, Generation
from omni.load import load_draft, load_omni
from omni.losses import next_token_loss_sum
from omni.models.kv_cache import KVCache
from omni.models.thinker import Thinker, ThinkerConfig
from omni.runtime import setup_compute
from omni.sampling import Sampling
from omni.stages import DRAFT, read_raw_config, stage_of
from omni.summary import read_summary


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors made inside that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        for leaf in tree_leaves(made):
            if torch.is_tensor(leaf) and leaf.untyped_storage()._cdata not in inputs | self._seen.keys():
                self._count(leaf.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), storage._cdata
        self.now += size
        self.most = max(self.most, self.now)

        def gone(_: Any) -> None:
            del self._seen[key]
            self.now -= size

        self._seen[key] = weakref.ref(storage, gone)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes at once of what the work makes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with Alive() as alive:
        work()
    return alive.most


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long it takes, once."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def in_turns(works: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each work; all of them run in every round, after one that does not count."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            taken = seconds(work, device)
            if number:
                found[name].append(taken)
    return {name: statistics.median(taken) for name, taken in found.items()}


def show(works: dict[str, Callable[[], object]], words: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Measure and print time and memory of each work beside those of the first; returns the seconds."""
    taken = in_turns(works, words.rounds, device)
    memory = {name: peak_bytes(work, device) for name, work in works.items()}
    first = next(iter(works))
    for name in works:
        print(
            f"{name:40} {taken[name] * 1e3:10.1f} ms  x {taken[name] / taken[first]:6.2f}"
            f"  {memory[name] / 2**20:9.2f} MiB  x {memory[name] / memory[first]:6.2f}"
        )
    return taken


def random_thinker(words: argparse.Namespace, device: torch.device) -> Thinker:
    """A Thinker of a configuration's shape, from random weights: what they are costs nothing."""
    path = stage_of("thinker").config_path(words.size)
    values = read_raw_config(path)
    config = from_dict(ThinkerConfig, values["model"], f"{path}: model")
    torch.manual_seed(0)
    thinker = Thinker(dataclasses.replace(config, vocab_size=values["data"]["vocab_size"])).to(device)
    shape = f"dim {config.dim}, {config.num_layers} layers, ctx_len {config.ctx_len}"
    print(f"Thinker of size {words.size} ({shape}), batch {words.batch}, {words.rounds} rounds, {device}")
    return thinker


def states(words: argparse.Namespace, device: torch.device) -> None:
    """Hidden states of a text by teacher forcing, and step by step with a cache."""
    thinker = random_thinker(words, device).eval()
    T, layer = words.length or thinker.config.ctx_len, thinker.config.num_layers // 2
    tokens_BT = torch.randint(thinker.config.vocab_size, (words.batch, T), device=device)
    valid_BT = torch.ones_like(tokens_BT, dtype=torch.bool)

    @torch.no_grad()
    def teacher_forced() -> torch.Tensor:
        return thinker(thinker.embed(tokens_BT), states_of=[layer]).hidden_states[layer]

    @torch.no_grad()
    def step_by_step() -> torch.Tensor:
        rows = Rows(thinker, Prompts(thinker.embed(tokens_BT[:, :1]), valid_BT[:, :1]), [layer])
        for at in range(1, T):
            rows.read(tokens_BT[:, at : at + 1])
        return torch.stack([rows.states(row, T)[layer] for row in range(words.batch)])

    show({"teacher forcing, one pass": teacher_forced, f"{T} steps with a cache": step_by_step}, words, device)
    print(f"largest difference of a state: {float((teacher_forced() - step_by_step()).abs().max()):.1e}")


def backward(words: argparse.Namespace, device: torch.device) -> None:
    """Forward and backward of a prompt of audio, with one target behind it and with the whole answer."""
    thinker = random_thinker(words, device).train()
    config = thinker.config
    num_audio, num_answer = words.audio or config.ctx_len // 4, words.answer
    heard_BTD = torch.randn(words.batch, num_audio, config.dim, device=device, requires_grad=True)
    answer_BT = torch.randint(config.vocab_size, (words.batch, num_answer), device=device)

    def learn(num_targets: int) -> None:
        # the last position of the audio predicts the first token of the answer
        said_BTD = thinker.embed(answer_BT[:, : num_targets - 1])
        final_BTD = thinker(torch.cat([heard_BTD, said_BTD], dim=1)).final_BTD[:, num_audio - 1 :]
        next_token_loss_sum(thinker, final_BTD, answer_BT[:, :num_targets]).backward()
        thinker.zero_grad(set_to_none=True)
        heard_BTD.grad = None

    alone, forced = f"audio alone ({num_audio}), 1 target", f"with its answer, {num_answer} targets"
    taken = show({alone: lambda: learn(1), forced: lambda: learn(num_answer)}, words, device)
    ratio = taken[alone] * num_answer / taken[forced]
    print(f"targets a second: teacher forcing gives {ratio:.1f} times as many")


class Appending(KVCache):
    """What growing memory is compared with: all keys and values are copied at each step."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers)
        self._held: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_layers

    @property
    def length(self) -> int:
        """Positions held."""
        return 0 if self._held[0] is None else self._held[0][0].shape[2]

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As the parent's."""
        held = self._held[layer]
        if held is not None:
            k, v = torch.cat([held[0], k], dim=2), torch.cat([held[1], v], dim=2)
        self._held[layer] = k, v
        return k, v


def cache(words: argparse.Namespace, device: torch.device) -> None:
    """Decoding with memory that grows, and with keys and values that are copied at each step."""
    thinker = random_thinker(words, device).eval()
    steps, num_layers = words.length or thinker.config.ctx_len, thinker.config.num_layers
    x_B1D = torch.randn(words.batch, 1, thinker.config.dim, device=device)

    @torch.no_grad()
    def decode(held: KVCache) -> None:
        for _ in range(steps):
            thinker(x_B1D, cache=held)

    works = {"reserved": lambda: decode(KVCache(num_layers)), "copied": lambda: decode(Appending(num_layers))}
    show(works, words, device)


def generate(words: argparse.Namespace, device: torch.device) -> None:
    """Greedy decoding with a KV cache, and ``generate`` of the stock Qwen3 class with the same weights."""
    from bench.peers import qwen3

    thinker = random_thinker(words, device).eval()
    peer, _ = qwen3(thinker.config)
    missing = peer.load_state_dict({f"model.{name}": value for name, value in thinker.state_dict().items()}, False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys, missing
    peer.tie_weights()
    peer.to(device).eval()
    told, new = 16, words.length or thinker.config.ctx_len - 16
    tokens_BT = torch.randint(thinker.config.vocab_size, (words.batch, told), device=device)
    valid_BT = torch.ones_like(tokens_BT, dtype=torch.bool)

    @torch.no_grad()
    def ours() -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in range(words.batch)]
        for run in Decoding(thinker, Prompts(thinker.embed(tokens_BT), valid_BT)).runs(new):
            for row, tokens in zip(rows, run, strict=True):
                row += tokens
        return rows

    def theirs() -> list[list[int]]:
        said_BT = peer.generate(
            tokens_BT, attention_mask=valid_BT.long(), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            use_cache=True, pad_token_id=0,
        )  # fmt: skip
        return said_BT[:, told:].tolist()

    pairs = [(a, b) for mine, other in zip(ours(), theirs(), strict=True) for a, b in zip(mine, other, strict=True)]
    taken = show({"ours": ours, "generate": theirs}, words, device)
    print(
        f"{new} tokens a row, {sum(a == b for a, b in pairs) / len(pairs):.1%} the same; "
        f"ours {taken['generate'] / taken['ours']:.2f} times as fast"
    )


def draft(words: argparse.Namespace, device: torch.device) -> None:
    """Answers to held-out chats with and without a draft: the same, how many guesses are kept, and what it gains."""
    checkpoint = words.checkpoint or stage_of("omni").checkpoint(words.size)
    model, tokenizer = load_omni(checkpoint)
    model = model.to(device)
    smaller = load_draft(words.draft or DRAFT.checkpoint(words.size), model.thinker, tokenizer)
    data = read_summary(checkpoint)["config"]["data"]
    chats = read_chats(words.sft or data["test"] or data["val"])
    chats = spread(chats, words.chats)
    features = FeatureStore(model, tokenizer, cache_of(checkpoint))
    paths = [[path for chat in chats for path in chat.paths(kind)] for kind in ("image", "audio")]
    features.add(*paths)
    encoder = Examiner(model, tokenizer, features).encoder
    prompts = [encoder.prompt(chat.messages[:-1]) for chat in chats]
    prompts.sort(key=lambda prompt: len(prompt.tokens))
    settings = AnswerSettings(words.max_tokens, Sampling(words.temperature, seed=1))
    sizes = [sum(weight.numel() for weight in part.parameters()) for part in (model.thinker, smaller)]
    print(
        f"{len(chats)} chats, Thinker of {sizes[0] / 1e6:.2f} M parameters, draft of {sizes[1] / 1e6:.2f} M, {device}"
    )

    def answers(guesses: int) -> list[Generation]:
        guessing = Draft(smaller, guesses) if guesses else None
        found = []
        for start in range(0, len(prompts), words.batch):
            generation = Generation(
                model, tokenizer, prompts[start : start + words.batch], features, settings, guessing
            )
            for _ in generation:
                pass
            found.append(generation)
        return found

    plain = answers(0)
    said = [answer.tokens for generation in plain for answer in generation.answers]
    passes = sum(generation.tally.passes for generation in plain)
    print(
        f"batch {words.batch}: {sum(map(len, said)) / len(said):.1f} tokens an answer, {passes} passes without a draft"
    )
    for guesses in words.guesses:
        found = answers(guesses)
        same = [answer.tokens for generation in found for answer in generation.answers] == said
        tallies = [generation.tally for generation in found]
        guessed, kept = sum(tally.guessed for tally in tallies), sum(tally.kept for tally in tallies)
        works: dict[str, Callable[[], object]] = {
            "plain": lambda: answers(0), "draft": lambda guesses=guesses: answers(guesses)
        }  # type: ignore[misc]  # fmt: skip
        taken = in_turns(works, words.rounds, device)
        print(
            f"{guesses} guesses: answers {'the same' if same else 'NOT THE SAME'}, {kept / max(guessed, 1):.2f} of "
            f"{guessed} guesses kept, {sum(tally.passes for tally in tallies)} passes, "
            f"{taken['plain'] / taken['draft']:.2f} times as fast"
        )
        if not same:
            raise UserError("the draft changed an answer, expected the same")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure one thing; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    for work, batch in ((states, 1), (backward, 32), (cache, 16), (generate, 1), (draft, 1)):
        command = commands.add_parser(work.__name__, help=(work.__doc__ or "").partition("\n")[0])
        command.set_defaults(work=work)
        command.add_argument("--size", default="nano", help="of the configurations meant (nano)")
        command.add_argument("--batch", type=int, default=batch, help=f"rows ({batch})")
        command.add_argument("--rounds", type=int, default=5, help="how often each is timed (5)")
        command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        if work in (states, cache, generate):
            command.add_argument("--length", type=int, default=0, help="tokens; by default the context is filled")
        if work is backward:
            command.add_argument("--audio", type=int, default=0, help="positions of audio; by default ctx_len // 4")
            command.add_argument("--answer", type=int, default=32, help="tokens of the answer (32)")
    command.add_argument("--checkpoint", type=Path, help="an omni.pt instead of that of the size")
    command.add_argument("--draft", type=Path, help="a thinker.pt instead of that of configs/draft_<size>.json")
    command.add_argument("--sft", help="chats (JSONL) instead of the checkpoint's own test set")
    command.add_argument("--chats", type=int, default=64, help="how many of them, evenly spread (64)")
    command.add_argument("--guesses", type=int, nargs="+", default=[2, 4, 8], help="at a time (2 4 8)")
    command.add_argument("--max-tokens", type=int, default=64, help="of an answer (64)")
    command.add_argument("--temperature", type=float, default=0.0)
    words = parser.parse_args(arguments)

    def work() -> int:
        words.work(words, setup_compute(RunConfig(device=words.device)).device)
        return 0

    return user_errors(work)


if __name__ == "__main__":
    sys.exit(main())
