"""Configuration: every mistake is found, all at once, and named with what was expected."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest

from omni.command_line import read_command_line
from omni.config import (
    PhaseConfig,
    Problem,
    StageConfig,
    UserError,
    from_dict,
    load_config,
    to_dict,
)
from omni.stages import DRAFT, JUDGE, STAGES, StageInfo
from tests.conftest import ROOT

PHASE = {"max_steps": 10, "batch_size": 2, "lr": 0.1}


@dataclass(frozen=True)
class Shape:
    dim: int = 8
    num_heads: int = 2
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)

    def problems(self) -> Iterator[Problem]:
        if self.dim % self.num_heads:
            yield Problem("dim", f"{self.dim} with {self.num_heads} heads", "a multiple of num_heads")


@dataclass(frozen=True, kw_only=True)
class Example(StageConfig):
    path: str | None = None
    model: Shape
    other: Shape = field(default_factory=Shape)
    first: PhaseConfig
    second: PhaseConfig
    third: PhaseConfig | None = None


def values(**changes: Any) -> dict[str, Any]:
    return {"name": "example", "model": {}, "first": dict(PHASE), "second": dict(PHASE), **changes}


def write(folder: Path, content: dict[str, Any] | str) -> Path:
    path = folder / "example.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def message(content: dict[str, Any] | str, folder: Path, *overrides: tuple[str, str]) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(Example, write(folder, content), overrides)
    return str(caught.value).splitlines()


def test_defaults_and_round_trip(tmp_path: Path) -> None:
    config = load_config(Example, write(tmp_path, values(model={"sizes": [1, 2], "weights": {"x": 1}})))
    assert config.model.sizes == (1, 2) and config.model.weights == {"x": 1.0}
    assert config.run.max_grad_norm == 1.0 and str(config.save_dir) == "checkpoints/example"
    assert from_dict(Example, to_dict(config), "again") == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.name = "other"  # type: ignore[misc]


def test_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    (line,) = message(values(model={"num_haeds": 4}), tmp_path)
    assert "example.json: model.num_haeds: found an unknown key" in line and '"num_heads"' in line


@pytest.mark.parametrize(
    ("model", "found", "expected"),
    [
        ({"dim": "8"}, '"8"', "a whole number"),
        ({"dim": 8.5}, "8.5", "a whole number"),
        ({"dim": True}, "true", "a whole number"),
        ({"kind": "c"}, '"c"', '"a", "b"'),
        ({"sizes": 3}, "3", "a list"),
        ({"sizes": [1, "x"]}, '"x"', "a whole number"),
        ({"weights": {"x": "y"}}, '"y"', "a number"),
        ([], "[]", "an object"),
    ],
)
def test_wrong_type(model: Any, found: str, expected: str, tmp_path: Path) -> None:
    (line,) = message(values(model=model), tmp_path)
    assert re.search(r"example\.json: model\S*: found ", line) and found in line and expected in line


def test_all_problems_at_once(tmp_path: Path) -> None:
    content = values(model={"dim": "x", "oops": 1}, first={"max_steps": 5}, second={**PHASE, "lr": -1})
    del content["name"]
    lines = message(content, tmp_path)
    for key in ("name", "model.dim", "model.oops", "first.batch_size", "first.lr", "second.lr"):
        assert any(f": {key}: " in line for line in lines), (key, lines)
    assert len(lines) == 6


def test_impossible_combination(tmp_path: Path) -> None:
    (line,) = message(values(model={"dim": 9}), tmp_path)
    assert "model.dim" in line and "9 with 2 heads" in line


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "not valid JSON"),
        ("[1]", "expected an object"),
        ('{"name": 1,\n "name": 2}', "found twice"),
        ('{"name": ', "example.json:1: not valid JSON"),
    ],
)
def test_malformed_file(content: str, expected: str, tmp_path: Path) -> None:
    assert expected in message(content, tmp_path)[0]


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, values())
    with pytest.raises(UserError, match=r"exmaple\.json: no such file.*did you mean .*example\.json"):
        load_config(Example, tmp_path / "exmaple.json")


def test_overrides_dotted_unique_and_for_every_phase(tmp_path: Path) -> None:
    path = str(write(tmp_path, values()))
    words = ["--config", path, "--max_steps", "30", "--first.lr=0.5", "--seed", "7", "--model.dim", "16",
             "--path=none", "--use_amp", "false", "--val-freq", "5"]  # fmt: skip
    config, fresh = read_command_line(Example, words)
    assert (config.first.max_steps, config.second.max_steps) == (30, 30)
    assert (config.first.lr, config.second.lr) == (0.5, 0.1)
    assert (config.run.seed, config.model.dim, config.other.dim) == (7, 16, 8)
    assert config.path is None and config.run.use_amp is False and config.run.val_freq == 5 and not fresh
    assert read_command_line(Example, ["--fresh", *words])[1]


def test_a_phase_that_may_be_left_out_can_be_set_where_it_is_there(tmp_path: Path) -> None:
    with_third = write(tmp_path, values(third=dict(PHASE)))
    config = load_config(Example, with_third, [("third.lr", "0.5"), ("max_steps", "7")])
    assert config.third == PhaseConfig(max_steps=7, batch_size=2, lr=0.5) and config.first.max_steps == 7
    assert load_config(Example, with_third, [("third", "null"), ("max_steps", "7")]).third is None
    assert load_config(Example, write(tmp_path, values()), [("max_steps", "7")]).third is None
    assert "--third.lr: found an unknown key" in message(values(), tmp_path, ("third.lr", "0.5"))[0]


@pytest.mark.parametrize("key", ["max_steps", "batch_size", "lr", "gradient_accumulation_steps"])
def test_last_names_of_phase_keys_set_every_phase(key: str, tmp_path: Path) -> None:
    config = load_config(Example, write(tmp_path, values()), [(key, "3")])
    assert getattr(config.first, key) == getattr(config.second, key) == 3


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (("dim", "4"), "one of model.dim, other.dim"),
        (("max_step", "4"), "did you mean --max_steps"),
        (("seed", "x"), "a whole number"),
        (("use_amp", "maybe"), "true or false"),
        (("model.sizes", "[1"), "JSON"),
    ],
)
def test_wrong_override_is_wrong_usage(override: tuple[str, str], expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(expected)) as caught:
        load_config(Example, write(tmp_path, values()), [override])
    assert caught.value.exit_code == 2 and f"--{override[0]}" in str(caught.value)


def test_override_cannot_hide_an_impossible_value(tmp_path: Path) -> None:
    (line,) = message(values(), tmp_path, ("model.dim", "9"))
    assert "model.dim" in line


@pytest.mark.parametrize("words", [["oops"], ["--seed"], ["--seed", "--lr"], ["--seed", "1"]])
def test_wrong_usage(words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read_command_line(Example, words)
    assert caught.value.exit_code == 2


# ---- the shipped configurations ----


def script(stage: StageInfo) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"script_{stage.kind}", ROOT / stage.script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def config_class(stage: StageInfo) -> type[StageConfig]:
    found = [item for item in vars(script(stage)).values()
             if isinstance(item, type) and issubclass(item, StageConfig) and item is not StageConfig]  # fmt: skip
    (only,) = found
    return only


SHIPPED = sorted((ROOT / "configs").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configuration_loads(path: Path) -> None:
    stage = next(stage for stage in (*STAGES, JUDGE, DRAFT) if path.stem.startswith(stage.prefix))
    config = load_config(config_class(stage), path)
    assert config.name == path.stem
    size = path.stem.removeprefix(stage.prefix + "_")
    text = path.read_text()
    for other in ("nano", "micro", "tiny", "base"):
        assert other == size or other not in text, f"{path.name} of size {size} names something of size {other}"
    # the keys that every stage answers to by their last name
    overrides = [(key, "3") for key in ("max_steps", "batch_size", "checkpoint_freq", "val_freq", "seed")]
    overrides += [("lr", "0.1"), ("save_dir", "/tmp/x"), ("gradient_accumulation_steps", "2")]
    assert load_config(config_class(stage), path, overrides).run.seed == 3


@pytest.mark.parametrize("size", ["nano", "micro", "tiny", "base"])
def test_every_stage_has_a_configuration(size: str) -> None:
    for stage in STAGES:
        assert (ROOT / stage.config_path(size)).exists(), stage.config_path(size)
