"""Every figure that `omni eval` prints, computed again from its raw predictions by a few lines that share no code."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni.cli import main
from omni.config import UserError
from omni.data.dialogue import read_chats
from omni.evaluate.omni import Examiner
from omni.features import FeatureStore
from omni.inspection.chance import figure_difference, judged, paired_difference
from omni.load import load_omni
from omni.metrics import ratio
from omni.predictions import Predictions, predictions_beside, read_predictions
from tests import toy_run

Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy run with its evaluation: eval.json, eval.predictions.jsonl and what was printed."""
    place = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        toy_run.make(place)
        # every second right answer is what the model says, so that the shares of right answers say something
        model, tokenizer = load_omni(place / "checkpoints/omni_sft_toy/omni.pt")
        chats = read_chats("data/sft.jsonl")
        said = Examiner(model, tokenizer, FeatureStore(model, tokenizer)).ask(chats).answers
        right = {f"{chat.task} {at // 7}": answer for at, (chat, answer) in enumerate(zip(chats, said, strict=True))
                 if at // 7 % 2 and answer}  # fmt: skip
        toy_run.write_chats(place / "data", right)
    return place


@pytest.fixture(scope="module")
def printed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(folder)
        patch.setattr("omni.runtime.usable_cores", lambda: 1)
        assert main(["eval", "--size", "toy", "--json", "eval.json", "--predictions", "eval.predictions.jsonl"]) == 0
    return said.getvalue()


# ---- the same again, in a few lines each ----


def edits(a: list[str] | str, b: list[str] | str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


def words(text: str) -> list[str]:
    """By what docs/evaluation.md says: lower case, no punctuation and no symbols but apostrophes inside of words."""
    kept = [" " if unicodedata.category(c)[0] in "PS" and c != "'" else c for c in text.lower()]
    return re.sub("(?<![a-z])'|'(?![a-z])", " ", "".join(kept)).split()


def mean(values: list[Any]) -> float:
    return float(sum(values)) / len(values)


def error_rate(lines: Lines, units: Any) -> float:
    pairs = [(units(line["reference"]), units(line["hypothesis"])) for line in lines]
    return sum(edits(*pair) for pair in pairs) / sum(len(reference) for reference, _ in pairs)


def slip(line: dict[str, Any], name: str) -> bool:
    said, heard, size = words(line["reference"]), words(line["hypothesis"]), len(words(line["reference"]))
    steps = line["alignment"]
    assert sum(max(b - a, d - c) for kind, a, b, c, d in steps if kind != "equal") == edits(said, heard)
    extra = [(a, heard[c:d]) for kind, a, _, c, d in steps if kind == "insert"]
    return {
        "repeats": any({*said[max(0, a - 1) : a + 1]} & {*more} for a, more in extra),
        "skips": any(kind == "delete" for kind, *_ in steps),
        "early_stops": any(kind == "delete" and b == size for kind, _, b, _, _ in steps),
        "late_stops": any(a == size for a, _ in extra),
    }[name]  # fmt: skip


def of_codes(lines: Lines, name: str) -> Any:
    columns = list(zip(*(row for line in lines for row in line["codes"]), strict=True))
    size, rate = lines[0]["codebook_size"], lines[0]["frames_per_second"]
    spread = [math.prod((n / len(c)) ** (-n / len(c)) for n in Counter(c).values()) for c in columns]
    return {
        "usage": [len(set(column)) / size for column in columns], "perplexity": spread,
        "bits_per_second": len(columns) * math.log2(size) * rate,
        "bits_per_second_carried": sum(map(math.log2, spread)) * rate,
    }[name]  # fmt: skip


def again(name: str, lines: Lines) -> Any:
    """The value of a figure from its predictions alone; every figure must be known here."""
    base = re.sub(r"_(recordings|unseen_\w+|judge)$", "", name)
    if re.search(r"(^|_)wer(_|$)", name):
        return error_rate(lines, words)
    if name.startswith("cer"):
        return error_rate(lines, lambda text: " ".join(words(text)))
    if base in ("repeats", "skips", "early_stops", "late_stops"):
        return mean([slip(line, base) for line in lines])
    if name.startswith("caption_swap"):
        each = [(line["true"], wrong if isinstance(wrong := line["wrong"], dict) else {"": wrong}) for line in lines]
        pairs = [(true, cosine) for true, wrong in each for cosine in wrong.values()]
        return mean([0.5 if a == b else a > b for a, b in pairs])
    if "_r1" in name:
        return mean([found == line["reference"] for line in lines for found in line["found"]])
    if re.search(r"_qa|accuracy", name):
        return mean([words(line["reference"]) == words(line["hypothesis"]) for line in lines])
    if name in ("usage", "bits_per_second", "bits_per_second_carried") or "codes" in lines[0]:
        return of_codes(lines, name)
    if name == "perplexity":
        return math.exp(sum(line["nats"] for line in lines) / sum(line["tokens"] for line in lines))
    if name == "mel_l1_by_codebooks":
        return [mean(list(column)) for column in zip(*(line["values"] for line in lines), strict=True)]
    if name == "infeasible":
        needed = [len(s) + sum(a == b for a, b in itertools.pairwise(s)) for s in (x["symbols"] for x in lines)]
        return mean([need > line["steps"] for need, line in zip(needed, lines, strict=True)])
    if base == "speaker_nearer":
        return mean([line["own"] > line["other"] for line in lines])
    if name == "length_outliers":
        return mean([not 0.5 <= line["frames"] / line["recorded"] <= 2 for line in lines])
    if name == "bits_per_byte":
        return sum(line["nats"] for line in lines) / math.log(2) / sum(line["bytes"] for line in lines)
    assert base in ("bits_per_byte_5gram", "mel_l1", "mel_l1_vocoder", "mcd", "speaker_similarity", "rtf",
                    "first_audio_ms"), f"{name}: nothing here computes it again"  # fmt: skip
    return sum(line["part"] for line in lines) / sum(line["whole"] for line in lines)


# ---- what is printed ----


def test_every_printed_figure_is_what_its_predictions_give(folder: Path, printed: str) -> None:
    figures = json.loads((folder / "eval.json").read_text())
    lines = [json.loads(line) for line in (folder / "eval.predictions.jsonl").read_text().splitlines()]
    assert list(figures) == ["thinker", "audio_enc", "vision", "codec", "talker", "omni"]
    rows = printed.split("-----\n")[1].split("\ntest sets")[0].splitlines()
    shown = {tuple(line.split()[:2]) for line in rows if line}
    assert shown == {(stage, name) for stage, found in figures.items() for name in found} and len(shown) > 55
    for stage, found in figures.items():
        for name, figure in found.items():
            own = [line for line in lines if (line.get("stage"), line.get("figure")) == (stage, name)]
            assert own and all(line["case"].startswith("data/") for line in own), (stage, name)
            assert figure["value"] == pytest.approx(again(name, own), rel=1e-5, abs=1e-6), (stage, name)
            if not (stage == "codec" and "codes" in own[0]):
                assert figure["n"] == len(own) == len({line["case"] for line in own}), (stage, name)
    # a figure that can be either, is neither: the recomputation is not of constants
    values = [figure["value"] for found in figures.values() for figure in found.values()]
    assert 0 < figures["omni"]["text_qa"]["value"] < 1 and len(set(map(str, values))) > 25


def test_intervals_are_those_of_another_bootstrap(folder: Path, printed: str) -> None:
    figures = json.loads((folder / "eval.json").read_text())
    rng, compared = np.random.default_rng(9), 0
    for name, scores in read_predictions(folder / "eval.predictions.jsonl").scores().items():
        stage, _, key = name.partition(".")
        pairs = np.array(list(scores.values()))
        draws = [pairs[rng.integers(0, len(pairs), len(pairs))].sum(0) for _ in range(3000)]
        low, high = np.quantile([part / whole for part, whole in draws], [0.025, 0.975])
        figure = figures[stage][key]
        near = 0.25 * (high - low) + 1e-6  # of few cases quantiles jump
        assert figure["low"] == pytest.approx(low, abs=near) and figure["high"] == pytest.approx(high, abs=near), name
        compared += 1
    assert compared > 50


def test_sets_are_named_with_their_hashes(folder: Path, printed: str) -> None:
    from omni.lineage import data_fingerprint

    sets = read_predictions(folder / "eval.predictions.jsonl").sets
    assert set(sets) == {"data/text.txt", "data/tts.csv", "data/images.json", "data/sft.jsonl"}
    assert sets["data/tts.csv"] == data_fingerprint(folder / "data/tts.csv", sorted((folder / "data").glob("*.wav")))
    assert all(row["sha256"] in printed and path in printed for path, row in sets.items())


# ---- pairs ----


def scores_of(parts: Any, wholes: Any = None) -> dict[tuple[str, str], tuple[float, float]]:
    wholes = np.ones(len(parts)) if wholes is None else wholes
    return {("set", f":{i}"): (float(a), float(b)) for i, (a, b) in enumerate(zip(parts, wholes, strict=True))}


def test_pairs_of_equal_models_are_chance() -> None:
    rng, found = np.random.default_rng(1), []
    for _ in range(200):
        hard = rng.random(60)
        one, other = ((rng.random(60) < hard).astype(float) for _ in range(2))
        difference = paired_difference(scores_of(one), scores_of(other))
        assert difference is not None
        found.append(difference)
    assert np.mean([item.p < 0.05 for item in found]) <= 0.09  # 5 %, and three standard errors
    assert np.mean([item.low <= 0 <= item.high for item in found]) >= 0.9


def test_pairs_find_what_intervals_alone_cannot() -> None:
    rng = np.random.default_rng(2)
    hard = rng.random(300)
    one = (hard < 0.5).astype(float)
    better = np.maximum(one, rng.random(300) < 0.06)  # right wherever the other is, and a little more
    paired = paired_difference(scores_of(one), scores_of(better))
    alone = figure_difference(ratio(one.tolist()).to_dict(), ratio(better.tolist()).to_dict())
    assert paired is not None and judged([paired])[0].larger and not judged([alone])[0].larger
    assert paired.value == pytest.approx(better.mean() - one.mean()) and paired.low > 0
    worse = paired_difference(scores_of(better), scores_of(one))
    assert worse is not None and (worse.value, worse.p) == (-paired.value, paired.p)


def test_what_is_no_pair_is_not_taken_for_one() -> None:
    some = scores_of([1, 0, 1])
    assert paired_difference(some, scores_of([1, 0, 1], [1, 1, 2])) is None  # other lengths: of sound, say
    assert paired_difference(some, scores_of([1, 0])) is None
    same = paired_difference(some, some)
    assert same is not None and (same.value, same.p) == (0, 1)


def write_run(folder: Path, right: Any, digest: str = "a" * 16, path: str = "x.csv") -> Path:
    folder.mkdir()
    figure = ratio(list(map(float, right)))
    (folder / "eval.json").write_text(json.dumps({"omni": {"image_qa": figure.to_dict()}}))
    predictions = Predictions({path: {"media": 0, "media_bytes": 0, "sha256": digest}})
    cases = [{**case.to_dict(), "case": f"{path}:{index}"} for index, case in enumerate(figure.cases)]
    predictions.add("omni", "image_qa", cases)
    predictions.write(predictions_beside(folder / "eval.json"))
    return folder


def test_compare_pairs_runs_by_their_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(2)
    one = rng.random(300) < 0.5
    better = one | (rng.random(300) < 0.06)
    first, second = write_run(tmp_path / "a", one), write_run(tmp_path / "b", better, path="elsewhere/x.csv")
    other_set = write_run(tmp_path / "c", better, digest="b" * 16)
    stale = write_run(tmp_path / "d", ~one)
    (stale / "eval.json").write_text((second / "eval.json").read_text())
    assert main(["compare", *map(str, (first, second, other_set, stale)), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    how = {item["second"]: (item["difference"]["paired"], item["verdict"]) for item in found["differences"]}
    assert how == {"B": (True, "larger than chance"), "C": (False, "not more than chance"),
                   "D": (False, "not more than chance")}  # fmt: skip
    assert "eval.predictions.jsonl holds predictions of another evaluation" in found["runs"][3]["notes"]
    assert main(["compare", str(first), str(second)]) == 0
    said = capsys.readouterr().out
    assert "larger than chance (paired)" in said and "1 figures were compared case by case" in said


@pytest.mark.parametrize("text", ["[1]\n", '{"set": 1}\n', "{}\n", "\x00", '{"stage": "a", "figure": "b"}\n'])
def test_a_foreign_file_is_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(UserError, match="omni eval --predictions FILE"):
        read_predictions(tmp_path / "x.jsonl")
