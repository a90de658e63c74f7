"""`omni compare` tells chance from a difference: over many synthetic runs, whose truth is known."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni.cli import main
from omni.curves import Curve
from omni.inspection.chance import SEED_SPREAD, Difference, curve_difference, figure_difference, judged
from omni.inspection.comparison import compare
from omni.metrics import ratio
from tests.conftest import ROOT
from tests.test_inspect import make


def synthetic(rng: np.random.Generator, event: str, effect: float = 0.0, spread: float | None = None) -> Curve:
    """A falling loss with an offset of its seed, and noise in which neighbours are alike (AR(1), 0.6)."""
    steps = np.arange(10, 610, 10) if event == "train" else np.arange(100, 700, 100)
    noise = 0.03 * rng.normal(size=len(steps))
    for index in range(1, len(steps) if event == "train" else 0):
        noise[index] = 0.6 * noise[index - 1] + 0.8 * noise[index]
    offset = rng.normal() * (SEED_SPREAD[event] if spread is None else spread) + math.log1p(effect)
    noise *= 1.0 if event == "train" else 0.1
    values = (1 + 4 * (steps / 20 + 1) ** -0.7) * np.exp(noise + offset)
    return Curve("run", tuple(steps.tolist()), tuple(values.tolist()), event == "val")


def share(event: str, seeds: int, effect: float, draws: int, spread: float | None = None) -> float:
    """How often two recipes of so many seeds each are told apart."""
    rng = np.random.default_rng(7)
    found = 0
    for _ in range(draws):
        first, second = ([synthetic(rng, event, change, spread) for _ in range(seeds)] for change in (0.0, effect))
        found += judged([curve_difference(first, second, SEED_SPREAD[event])])[0].larger
    return found / draws


@pytest.mark.parametrize("event", ["train", "val"])
@pytest.mark.parametrize("seeds", [1, 3])
def test_seeds_alone_are_chance(event: str, seeds: int) -> None:
    # 5 % at most by construction; 0.09 is three standard errors above that in 200 draws
    assert share(event, seeds, 0.0, 200) <= 0.09


def test_seeds_that_lie_further_apart_than_assumed_are_found_out_by_giving_several() -> None:
    """One run a recipe must rely on the assumption; four replace it by what they show."""
    assert share("val", 4, 0.0, 150, spread=0.06) <= 0.15
    assert share("val", 4, 0.06, 60, spread=0.005) > share("val", 1, 0.06, 60, spread=0.005)


@pytest.mark.parametrize(
    ("event", "seeds", "effect", "power"), [("val", 1, 0.25, 0.9), ("val", 3, 0.12, 0.9), ("train", 3, 0.3, 0.9)]
)
def test_a_real_difference_is_larger_than_chance(event: str, seeds: int, effect: float, power: float) -> None:
    assert share(event, seeds, effect, 60) >= power
    assert share(event, seeds, -effect / (1 + effect), 60) >= power


def test_one_run_twice_and_curves_that_cannot_be_compared() -> None:
    line = synthetic(np.random.default_rng(0), "train")
    assert curve_difference([line], [line], 0.05).p == 1.0
    negative = Curve("run", line.steps, tuple(-value for value in line.values))
    for other in (negative, Curve("run", (), ())):
        assert judged([curve_difference([line], [other], 0.05)])[0].verdict == "cannot be said"
    # a run that has gone half as far is held against the same part of the other
    half = Curve("run", line.steps[:30], line.values[:30])
    assert curve_difference([line], [half], 0.05).value == pytest.approx(0, abs=1e-12)


# ---- figures ----


def drawn(rng: np.random.Generator, n: int, rate: float) -> dict[str, Any]:
    return ratio((rng.random(n) < rate).astype(float).tolist(), draws=400).to_dict()


@pytest.mark.parametrize(("n", "rate"), [(12, 0.5), (40, 0.1), (200, 0.03)])
def test_figures_of_equal_models_are_chance(n: int, rate: float) -> None:
    rng = np.random.default_rng(3)
    pairs = [figure_difference(drawn(rng, n, rate), drawn(rng, n, rate)) for _ in range(300)]
    assert np.mean([item.p < 0.05 for item in pairs]) <= 0.085  # 5 %, and three standard errors
    assert np.mean([item.low <= 0 <= item.high for item in pairs]) >= 0.915


def test_figures_of_better_models_are_not() -> None:
    rng = np.random.default_rng(4)
    pairs = [figure_difference(drawn(rng, 150, 0.6), drawn(rng, 150, 0.85)) for _ in range(40)]
    assert np.mean([item.p < 0.05 for item in pairs]) > 0.95
    assert np.mean([item.value for item in pairs]) == pytest.approx(0.25, abs=0.03)


def figure(value: float, n: int, low: float, high: float) -> dict[str, Any]:
    return {"value": value, "n": n, "low": low, "high": high}


def test_odd_intervals() -> None:
    # five of five right is no proof of being perfect, although the bootstrap finds no spread
    assert figure_difference(figure(1.0, 5, 1.0, 1.0), figure(0.9, 1000, 0.88, 0.92)).p > 0.05
    assert figure_difference(figure(1.0, 500, 1.0, 1.0), figure(0.9, 1000, 0.88, 0.92)).p < 0.001
    # a constant is exact; a perplexity may lie outside of its own interval; NaN and missing say nothing
    assert figure_difference(figure(600, 9, 600, 600), figure(400, 9, 400, 400)).p == 0
    biased = figure(431.7, 13_855, 420.2, 427.3)
    assert figure_difference(biased, figure(434, 13_855, 423, 430)).p > 0.05
    for other in (figure(math.nan, 9, 0, 1), figure(0.5, 1, 0, 1), {"value": 0.5}):
        assert judged([figure_difference(biased, other)])[0].verdict == "cannot be said"


def test_among_many_figures_chance_is_still_chance() -> None:
    rng = np.random.default_rng(5)
    families = [judged([Difference(0, 0, 0, p) for p in rng.random(60)]) for _ in range(400)]
    assert np.mean([any(item.larger for item in family) for family in families]) <= 0.08
    mixed = judged([Difference(0, 0, 0, p) for p in (1e-9, 0.03, 0.5, math.nan, 1e-6)])
    assert [item.larger for item in mixed] == [True, False, False, False, True]


# ---- the command ----


def write_run(folder: Path, seed: int, effect: float = 0.0, **settings: Any) -> Path:
    """The folder of a run that has trained with a seed."""
    rng = np.random.default_rng(seed)
    config = {"name": folder.name, "run": {"seed": seed, "save_dir": str(folder)}, "train": {"lr": 0.1, **settings}}
    make(folder / "toy.pt", "toy", config=config, lineage={"data": "same"}, step=600, max_steps=600)
    lines = []
    for event in ("train", "val"):
        line = synthetic(rng, event, effect)
        lines += [
            {"phase": "train", "step": step, "event": event, "loss": loss}
            for step, loss in zip(line.steps, line.values, strict=True)
        ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_two_seeds_and_two_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / f"s{seed}", seed) for seed in (1, 2)]
    better = write_run(tmp_path / "better", 3, -0.4, lr=0.2)
    assert main(["compare", *map(str, runs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [item["verdict"] for item in found["differences"]] == ["not more than chance"] * 2
    assert [item["key"] for item in found["settings"]] == ["run.seed"]
    assert all(item["seed_alone"] for item in found["differences"])
    assert main(["compare", str(runs[0]), str(better), "--html", str(tmp_path / "out.html")]) == 0
    said = capsys.readouterr().out
    assert said.count("larger than chance") == 3 and re.search(r"train\.lr +0\.1 +0\.2", said)  # 2 rows, and the sum
    assert "2 of 2 differences are larger than chance" in said and "assumed to differ by" in said
    page = (tmp_path / "out.html").read_text()
    assert page.count("<svg") == 2 and "larger than chance" in page and "<script" not in page
    # the two seeds are one recipe, whose spread is measured
    assert main(["compare", *map(str, runs), str(better), "--json"]) == 0
    differences = json.loads(capsys.readouterr().out)["differences"]
    sides = {(item["first"], item["second"], item["difference"]["larger"]) for item in differences}
    assert sides == {("AB", "C", True), ("A", "B", False)}


def test_figures_of_whole_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    both = {"value": [0.9, 0.5], "n": 900, "low": [0.88, 0.48], "high": [0.92, 0.52]}
    for name, cer, usage in (("one", 0.04, 0.5), ("two", 0.2, 0.51)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        spread = figure(cer, 100, cer - 0.01, cer + 0.012)
        stages = {"talker": {"cer": spread}, "codec": {"usage": {**both, "value": [0.9, usage]}}}
        (tmp_path / "runs" / name / "eval.json").write_text(json.dumps(stages))
    assert main(["compare", "runs/one", "runs/two", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    verdicts = {item["name"]: item["verdict"] for item in found["differences"]}
    assert verdicts == {
        "talker.cer": "larger than chance",
        "codec.usage[1]": "not more than chance",
        "codec.usage[2]": "not more than chance",
    }
    assert found["differences"][0]["difference"]["value"] == pytest.approx(0.16)
    assert main(["compare", "runs/one/eval.json", "runs/two"]) == 0
    said = capsys.readouterr().out
    assert "0.04 [0.03, 0.052]" in said and "over test cases, not over seeds" in said


def test_an_evaluation_of_other_checkpoints_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sha = make(tmp_path / "checkpoints" / "thinker_mine" / "thinker.pt", "thinker", config={"name": "thinker_mine"})
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "eval.json").write_text("{}")
    for made_from, notes in ((sha, 0), ("other", 1)):
        (folder / "state.json").write_text(json.dumps({"evaluation": {"made_from": {"thinker": made_from}}}))
        first = compare([folder, folder]).contestants[0]
        assert list(first.runs) == ["thinker"] and len(first.notes) == notes


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["{a}"], 2, "expected at least two"),
        (["{a}", "{root}"], 1, "a folder of 1 runs, expected one"),
        (["{a}", "nowhere"], 1, "nowhere"),
        (["{a}", "{bad}"], 1, "what `omni eval --json FILE` writes"),
    ],
)
def test_wrong_use_is_one_line(
    words: list[str], code: int, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a", 1)
    (tmp_path / "bad.json").write_text("[1]")
    places = {"a": tmp_path / "a", "root": tmp_path, "bad": tmp_path / "bad.json"}
    assert main(["compare", *(word.format(**places) for word in words)]) == code
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1


def test_needs_no_torch() -> None:
    from tests.conftest import command

    code = "import omni.inspection.comparison_view, sys; sys.exit('torch' in sys.modules)"
    assert command("-c", code, cwd=ROOT).returncode == 0
