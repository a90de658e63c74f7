"""Stage A as a person runs it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train_text
from omni.config import UserError
from omni.data.text import packed
from omni.load import load_draft, load_thinker
from omni.models.thinker import Thinker, ThinkerConfig
from omni.summary import fingerprint, read_summary
from omni.tokenizer import Tokenizer
from tests.conftest import ROOT, RunStage, command, metrics
from tests.test_training_loop import gradient

SCRIPT = ROOT / "train_text.py"
STAGE = train_text.TextConfig, train_text.build


def config(babble: Path, save_dir: Path, **data: Any) -> dict[str, Any]:
    return {
        "name": "thinker_toy",
        "data": {"train": str(babble / "text.txt"), "vocab_size": 320, **data},
        "model": {"ctx_len": 32, "dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "hidden_dim": 64},
        "train": {"max_steps": 40, "batch_size": 8, "lr": 0.01, "warmup_steps": 4},
        "run": {"save_dir": str(save_dir), "val_freq": 20, "checkpoint_freq": 15, "print_freq": 10,
                "tensorboard": False, "num_threads": 1},
    }  # fmt: skip


Write = Callable[[dict[str, Any]], Path]


def test_trains_resumes_and_can_be_loaded(
    babble: Path, tmp_path: Path, write_config: Write, run_here: RunStage
) -> None:
    path = write_config(config(babble, tmp_path / "run"))
    done = command(SCRIPT, "--config", path)
    assert done.returncode == 0, done.stderr
    losses = [line["loss"] for line in metrics(tmp_path / "run") if line["event"] == "train"]
    assert losses[-1] < 0.7 * losses[0]
    assert "perplexity" in done.stdout and (tmp_path / "run" / "tokenizer.model").exists()
    thinker, tokenizer = load_thinker(tmp_path / "run" / "thinker.pt")
    assert tokenizer.decode(tokenizer.encode("two  and\ttwo ☃")) == "two  and\ttwo ☃"
    assert thinker.embed_tokens.num_embeddings == tokenizer.vocab_size
    # from the checkpoint of step 30 the same end is reached
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    (tmp_path / "again" / "thinker.pt").unlink()
    again = run_here(*STAGE, "--config", path, "--save_dir", tmp_path / "again")
    assert again.returncode == 0 and "step 30)" in again.stdout, again.stdout
    sums = [read_summary(tmp_path / name / "thinker.pt") for name in ("run", "again")]
    assert sums[0]["figures"] == sums[1]["figures"]
    assert metrics(tmp_path / "run") == metrics(tmp_path / "again")


def test_folder_of_texts_and_own_validation(
    babble: Path, tmp_path: Path, write_config: Write, run_here: RunStage
) -> None:
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.txt"):
        shutil.copy(babble / "text.txt", tmp_path / "texts" / name)
    values = config(babble, tmp_path / "run", train=str(tmp_path / "texts"), val=str(babble / "text.txt"))
    done = run_here(*STAGE, "--config", write_config(values), "--max_steps=2")
    assert done.returncode == 0, done.stderr


def test_a_draft_has_the_tokenizer_of_the_larger_one(
    babble: Path, tmp_path: Path, write_config: Write, run_here: RunStage
) -> None:
    """Trained from another text, with a vocabulary that this text would not give; loaded as what it is for."""
    larger, draft, other = tmp_path / "larger", tmp_path / "draft", tmp_path / "other"
    assert run_here(*STAGE, "--config", write_config(config(babble, larger)), "--max_steps=1").returncode == 0
    (tmp_path / "own.txt").write_text("zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich .\n" * 60)
    values = config(babble, draft, train=str(tmp_path / "own.txt"), vocab_size=300) | {"name": "draft_toy"}
    path = write_config(values | {"thinker_ckpt": str(larger / "thinker.pt")})
    assert run_here(*STAGE, "--config", path, "--max_steps=2", "--model.dim=16").returncode == 0
    thinker, tokenizer = load_thinker(larger / "thinker.pt")
    small, own = load_thinker(draft / "thinker.pt")
    assert own.model == tokenizer.model and small.config.vocab_size == tokenizer.vocab_size and small.config.dim == 16
    lineage = read_summary(draft / "thinker.pt")["lineage"]
    assert lineage["tokenizer"] == tokenizer.hash and lineage["thinker"] == fingerprint(larger / "thinker.pt")
    assert load_draft(draft / "thinker.pt", thinker, tokenizer).config == small.config
    # one that learned its own, and one that could not follow to the end of the context
    words = ("--config", path, "--save_dir", other, "--max_steps=1", "--thinker_ckpt=none")
    assert run_here(*STAGE, *words).returncode == 0
    with pytest.raises(UserError, match=r"other/thinker\.pt: found a Thinker with tokenizer \w+, expected"):
        load_draft(other / "thinker.pt", thinker, tokenizer)
    longer = Thinker(dataclasses.replace(thinker.config, ctx_len=33))
    with pytest.raises(UserError, match="found a Thinker with ctx_len 32, expected at least 33"):
        load_draft(draft / "thinker.pt", longer, tokenizer)
    done = run_here(*STAGE, "--config", path, "--thinker_ckpt", tmp_path / "none.pt", "--fresh")
    assert done.returncode == 1 and "none.pt: no such checkpoint" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "no such file"), (b"", "empty"), (b"\xff\xfe\x00bad", "not UTF-8"), (b"a b c", "")],
)
def test_bad_text_is_one_line(
    content: bytes | None, expected: str, babble: Path, tmp_path: Path, write_config: Write, run_here: RunStage
) -> None:
    text = tmp_path / "bad.txt"
    if content is not None:
        text.write_bytes(content)
    done = run_here(*STAGE, "--config", write_config(config(babble, tmp_path / "run", train=str(text))))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and expected in done.stderr
    assert not list((tmp_path / "run").glob("*.pt")) if (tmp_path / "run").exists() else True


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--config", "nowhere.json"], "nowhere.json: no such file"),
        (["--config", "{config}", "--max_stps", "3"], "did you mean --max_steps"),
        (["--max_steps", "3"], "expected one --config"),
        ([], "usage"),
    ],
)
def test_wrong_usage(
    words: list[str], expected: str, babble: Path, tmp_path: Path, write_config: Write, run_here: RunStage
) -> None:
    path = write_config(config(babble, tmp_path / "run"))
    done = run_here(*STAGE, *[word.format(config=path) for word in words])
    assert done.returncode == (1 if "nowhere.json" in words else 2)
    assert expected in done.stderr + done.stdout and "Traceback" not in done.stderr


def test_help_lists_the_keys(run_here: RunStage) -> None:
    done = run_here(*STAGE, "--help")
    assert done.returncode == 0 and "--model.ctx_len" in done.stdout and "--run.seed" in done.stdout


def test_accumulation_of_the_thinker(babble: Path) -> None:
    """4 batches of 8 windows have the gradient of 1 of 32, although each has other numbers of targets of both terms."""
    text = "".join(
        f"<|user|> {'why ' * (i % 7 + 1)}<|end|><|assistant|> {'so ' * (i % 5)}<|end|>\n\n" for i in range(200)
    )
    tokenizer = Tokenizer.train(text.splitlines(), 300)
    tokens = np.array(tokenizer.encode(text))
    windows = packed(tokens, 24, tokenizer, separate_documents=True, order="text")
    gradients, counts = [], []
    for rows in ([range(32)], [range(i, i + 8) for i in range(0, 32, 8)]):
        torch.manual_seed(0)
        shape = {"ctx_len": 24, "dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "hidden_dim": 64}
        thinker = Thinker(ThinkerConfig(vocab_size=tokenizer.vocab_size, **shape))
        batches = [windows.collate([windows.sample(i, None) for i in part]) for part in rows]
        counts.append([batch.counts["answers"] for batch in batches])
        gradients.append(gradient(thinker, train_text.loss, {"tokens": 1.0, "answers": 0.5}, batches))
    assert len(set(counts[1])) > 1 and sum(counts[1]) == counts[0][0]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)
