"""The house holds: layers, sizes of files and functions, and the habits that a reader can rely on."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ("train_text.py", "train_audio_enc.py", "train_vision.py", "train_talker.py", "sft_omni.py")

# A module imports only from a layer below its own. docs/architecture.md shows the same table.
LAYERS = {
    0: ("config", "parallel", "processes", "atomic", "files", "sample", "sound_files", "data.entries",
        "models.kv_cache", "models.segments"),
    1: ("command_line", "console", "curves", "page", "predictions", "stages", "summary", "lineage", "anomaly",
        "guards", "ranks", "training_types", "plan_types", "step_cost",
        "tokenizer", "speech_text", "sampling", "sound_device", "audio",
        "models.layers", "models.ctc"),
    2: ("answer_text", "plan_view", "boards", "runtime", "cache", "checkpoint", "tracking", "metrics", "timing",
        "data.stream", "data.manifest", "models.one_position", "models.attention_heads", "models.audio_encoder",
        "models.cross_attention", "models.quantizer", "models.projector", "models.lora",
        "models.vocoder", "models.speaker"),
    3: ("save_folder", "optim", "planning", "models.thinker", "models.vision_encoder", "models.codec",
        "models.talker", "data.text", "data.speech", "data.images"),
    4: ("training_utils", "losses", "decoding", "generate_codes", "thinker_states", "models.speech", "data.voices",
        "data.synthetic", "data.spoken", "data.dialogue", "data_memory", "hearing"),
    5: ("models.omni", "prompt_pieces", "generate_speech", "data.leaks", "data.chat_batch"),
    6: ("stand_ins", "streaming", "data.parts", "data.check", "data.mixture", "load", "features", "alignment"),
    7: ("generate", "rehearsal"),
    8: ("evaluate",),
    9: ("assistant", "inspection", "report", "say", "talker_stage"),
    10: ("chat", "run", "server"),
    11: ("cli",),
}  # fmt: skip
# The micro-world is a room of its own: only these two are its doors.
DOORS = ("omni.data.synthetic", "omni.data.spoken")
WORLD = ("chats", "drawing", "espeak", "holdouts", "lexicon", "primer", "questions", "recordings", "stories", "world",
         "world_plan")  # fmt: skip

# Folders whose modules may import each other.
ROOMS = ("omni.evaluate.", "omni.inspection.", "omni.server.")


def modules() -> list[Path]:
    return sorted((ROOT / "omni").rglob("*.py"))


def every_file() -> list[Path]:
    return [*modules(), *(ROOT / name for name in SCRIPTS), *sorted((ROOT / "tests").glob("*.py"))]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def layer_of(module: str) -> int | None:
    """The layer of ``omni.x.y``; None for the bare package and for a module that has none."""
    inner = module.removeprefix("omni.")
    for layer, names in LAYERS.items():
        if any(inner == name or inner.startswith(name + ".") for name in names):
            return layer
    return None


def imports_of(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether when the file is imported) of everything that a file imports from this project."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef)
             for node in ast.walk(function)}  # fmt: skip
    known = {name_of(module) for module in modules()}
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name in known else node.module for name in inside]
        for name in found:
            yield name, id(node) not in inner


def is_world(module: str) -> bool:
    return module.removeprefix("omni.data.") in WORLD


@pytest.mark.parametrize("path", [p for p in modules() if p.name != "__init__.py"], ids=name_of)
def test_module_imports_only_from_below(path: Path) -> None:
    name = name_of(path)
    if is_world(name):
        # the micro-world's modules import each other and the configuration's errors
        others = {other for other, _ in imports_of(path) if other.startswith("omni.")}
        assert all(is_world(other) or layer_of(other) == 0 for other in others), (name, others)
        return
    layer = layer_of(name)
    assert layer is not None, f"{name}: has no layer; give it one in LAYERS and in docs/architecture.md"
    for other, _ in imports_of(path):
        if not other.startswith("omni."):
            continue
        if is_world(other):
            assert name in DOORS, f"{name} imports {other}: only {' and '.join(DOORS)} may"
            continue
        below = layer_of(other)
        assert below is not None, f"{name} imports {other}, which has no layer"
        room = next((room for room in ROOMS if name.startswith(room)), None)
        same_room = room is not None and other.startswith(room)
        assert below < layer or same_room, f"{name} (layer {layer}) imports {other} (layer {below})"


def test_no_import_runs_in_a_circle() -> None:
    graph = {name_of(path): {other for other, early in imports_of(path) if early} for path in modules()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        if name not in done:
            for other in graph.get(name, ()):
                if other != name:
                    visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_models_know_no_data_and_no_loop() -> None:
    for path in (ROOT / "omni" / "models").glob("*.py"):
        for other, _ in imports_of(path):
            assert not other.startswith("omni.data"), f"{path.name} imports {other}"
            assert other not in ("omni.training_utils", "omni.checkpoint"), f"{path.name} imports {other}"


def test_loop_knows_no_model_and_no_data() -> None:
    for name in ("training_utils", "optim", "tracking", "checkpoint"):
        for other, _ in imports_of(ROOT / "omni" / f"{name}.py"):
            assert not other.startswith(("omni.models", "omni.data")), f"{name} imports {other}"


def test_scripts_never_import_each_other() -> None:
    names = {Path(name).stem for name in SCRIPTS}
    for path in [*modules(), *(ROOT / name for name in SCRIPTS)]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            found = {node.module} if isinstance(node, ast.ImportFrom) else set()
            found |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            assert not found & names, f"{path}: imports the script {found & names}"


def test_only_audio_imports_torchaudio() -> None:
    for path in [*modules(), *(ROOT / name for name in SCRIPTS)]:
        text = path.read_text(encoding="utf-8")
        uses = any(
            (isinstance(node, ast.Import) and any(alias.name.startswith("torchaudio") for alias in node.names))
            or (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torchaudio"))
            for node in ast.walk(ast.parse(text))
        )  # fmt: skip
        assert not uses or path.name == "audio.py", f"{path}: imports torchaudio"


def test_no_room_without_a_name() -> None:
    for path in every_file():
        assert path.stem not in ("utils", "common", "helpers", "misc"), path


@pytest.mark.parametrize("path", every_file(), ids=lambda path: path.name)
def test_files_and_functions_are_short(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    limit = 550 if path.name in ("training_utils.py", "test_imports.py") or path.parent.name == "tests" else 400
    assert len(lines) <= limit, f"{path}: {len(lines)} lines, at most {limit}"
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef):
            size = (node.end_lineno or 0) - node.lineno + 1
            # a stage's `build` shows the whole stage on one page, its phases as functions inside
            most = 90 if node.name == "build" else 60
            assert size <= most, f"{path}:{node.lineno}: {node.name} has {size} lines, at most {most}"


def test_no_key_has_a_default_at_its_use() -> None:
    """``config.get(key, default)`` and ``getattr(config, key, default)`` turn a typo into the default."""
    for path in [*modules(), *(ROOT / name for name in SCRIPTS)]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node)
            owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
            reads = isinstance(node.func, ast.Attribute) and node.func.attr == "get" and len(node.args) == 2
            assert not (reads and owner.endswith(("cfg", "config"))), f"{path}:{node.lineno}: {call}"
            plain = isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) == 3
            assert not (plain and ast.unparse(node.args[0]).endswith(("cfg", "config"))), (
                f"{path}:{node.lineno}: {call}"
            )


@pytest.mark.parametrize(
    "module", ["omni.cli", "omni.run", "omni.summary", "omni.stages", "omni.config", "omni.inspection.html"]
)
def test_what_must_be_quick_needs_no_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
