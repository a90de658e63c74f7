"""The `omni` command: reads the words and calls the module that does the work."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omni.atomic import write_whole
from omni.config import UserError
from omni.console import user_errors
from omni.evaluate.suite import NAMES
from omni.page import plain_section
from omni.stages import DRAFT, STAGES, stage_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (0, 1 for a mistake in what was given, 2 for wrong usage)."""
    words = build_parser().parse_args(arguments)
    return user_errors(lambda: words.function(words))


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="omni", description="Train a whole omni model from random weights, and look at what it learned."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="data, stages A to E, evaluation and report; continues where it stopped")
    run.add_argument("--size", required=True, help="nano, micro, ...: the configurations configs/<stage>_<size>.json")
    run.add_argument("--dry-run", action="store_true", help="show the steps and do none")
    run.add_argument(
        "--jobs", type=int, default=0, metavar="N",
        help="stages trained side by side (default: two, or one where there is a GPU)",
    )  # fmt: skip
    run.set_defaults(function=_run)

    evaluate = commands.add_parser("eval", help="held-out figures of every stage, with n and a 95 %% interval")
    evaluate.add_argument("--size", required=True, help="whose checkpoints: those of configs/<stage>_<size>.json")
    evaluate.add_argument("--stage", choices=NAMES, action="append", default=[], help="only this; may be repeated")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    evaluate.add_argument(
        "--predictions", type=Path, metavar="FILE",
        help="write what was predicted case by case (JSONL); X.predictions.jsonl beside X.json is found by compare",
    )  # fmt: skip
    evaluate.add_argument("--text", metavar="FILE", help="evaluate the thinker on this text")
    evaluate.add_argument("--asr", metavar="FILE", help="evaluate the audio encoder on this CSV (wav,text)")
    evaluate.add_argument("--images", metavar="FILE", help="evaluate the vision encoder on this JSON (image, caption)")
    evaluate.add_argument("--tts", metavar="FILE", help="evaluate codec and talker on this CSV (wav,text,speaker)")
    evaluate.add_argument("--sft", metavar="FILE", help="evaluate the omni model on these chats (JSONL)")
    evaluate.add_argument("--limit", type=int, metavar="N", help="at most N sentences of each speech-output set")
    evaluate.add_argument("--quiet", action="store_true", help="print no table")
    evaluate.set_defaults(function=_evaluate)

    _add_looking(commands)
    _add_talking(commands)
    _add_samples(commands)

    data = commands.add_parser("data", help="write the micro-world; check manifests")
    kinds = data.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    synth = kinds.add_parser("synth", help="write the micro-world into DIR/SIZE")
    synth.add_argument("--size", required=True, help="nano, micro, tiny, base or test")
    synth.add_argument("--out", type=Path, default=Path("data"), metavar="DIR", help="default: data")
    synth.add_argument("--seed", type=int, default=0)
    synth.set_defaults(function=_synth)
    speak = kinds.add_parser("speak", help="let the voices of the micro-world speak your own text: more for stage B")
    speak.add_argument("texts", nargs="+", type=Path, metavar="FILE.txt")
    speak.add_argument("--out", required=True, type=Path, metavar="DIR", help="for wavs/ and spoken.csv")
    speak.add_argument("--sentences", type=int, default=2000, metavar="N", help="at most; default: 2000")
    speak.add_argument("--pace", type=float, default=1.0, metavar="X", help="0.5 to 2; 1 is 13 characters a second")
    speak.add_argument("--seed", type=int, default=0)
    speak.set_defaults(function=_speak_data)
    check = kinds.add_parser("check", help="read all data that configurations name; list all problems")
    check.add_argument("configs", nargs="+", type=Path, metavar="CONFIG.json")
    check.set_defaults(function=_check)
    return parser


def _add_samples(commands: Any) -> None:
    """The command that shows what speech output sounds like."""
    samples = commands.add_parser(
        "samples", help="held-out sentences as recorded, coded and spoken; with --stage what another stage does"
    )
    samples.add_argument("--size", required=True, help="whose checkpoints: those of configs/<stage>_<size>.json")
    samples.add_argument("--out", type=Path, required=True, metavar="DIR")
    samples.add_argument("--stage", choices=[stage.kind for stage in STAGES], default="talker", help="talker")
    samples.add_argument("--set", metavar="FILE", help="a held-out set in the form of the stage's data instead")
    samples.add_argument("--tts", metavar="FILE", dest="set", help="the same, for sentences (wav,text,speaker)")
    samples.add_argument("--count", type=int, default=3, metavar="N", help="the first N cases (3)")
    samples.set_defaults(function=_samples)


def _add_looking(commands: Any) -> None:
    """The commands that look at checkpoints and runs."""
    look = commands.add_parser("inspect", help="what a checkpoint, a run or a folder of runs is; also while it trains")
    look.add_argument("path", type=Path, metavar="PATH", help="a checkpoint, a run's save_dir, or checkpoints/")
    look.add_argument("--health", action="store_true", help="load the weights: norms, dead units and codes, changes")
    look.add_argument("--samples", action="store_true", help="load the model: what it does with held-out data")
    look.add_argument("--trace", action="store_true", help="of an omni.pt: a sample's way through each projector")
    look.add_argument("--json", action="store_true", help="print one JSON object instead")
    look.add_argument(
        "--html", type=Path, metavar="FILE",
        help="write it as one page that needs no other file; of one run or checkpoint with its samples",
    )  # fmt: skip
    look.set_defaults(function=_inspect)

    plan = commands.add_parser("plan", help="what a configuration will take: memory by part, operations, time")
    plan.add_argument("configs", nargs="+", type=Path, metavar="CONFIG.json")
    plan.add_argument("--memory", type=float, default=12.0, metavar="GB", help="of the GPU it shall fit (12)")
    plan.add_argument("--gpus", type=int, default=1, metavar="N", help="ranks that share each batch (1)")
    plan.add_argument(
        "--seconds", type=float, default=10.0, metavar="S", help="to measure steps for, each phase (10); 0: no time"
    )
    plan.add_argument("--device", default="auto", help="where time is measured: auto, cpu, cuda or cuda:N")
    plan.add_argument("--json", action="store_true", help="print one JSON list instead")
    plan.set_defaults(function=_plan)

    against = commands.add_parser("compare", help="what differs between runs, and whether by more than chance")
    against.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN",
        help="a save_dir, a runs/<size>, or a file of `omni eval --json`; all are held against the first",
    )  # fmt: skip
    against.add_argument("--json", action="store_true", help="print one JSON object instead")
    against.add_argument("--html", type=Path, metavar="FILE", help="write it as one page that needs no other file")
    against.set_defaults(function=_compare)


def _add_talking(commands: Any) -> None:
    """The commands that let it talk."""
    speak = commands.add_parser("speak", help="speak a text into a WAV file")
    speak.add_argument("text", metavar="TEXT", help="what to say")
    speak.add_argument("--out", type=Path, required=True, metavar="FILE.wav")
    speak.add_argument("--voice", metavar="NAME", help="a speaker of the training data; by default the clearest")
    speak.add_argument("--reference", type=Path, metavar="FILE", help="a recording whose voice to take instead")
    speak.add_argument("--size", default="nano", help="whose talker.pt: that of configs/talker_<size>.json (nano)")
    speak.add_argument("--checkpoint", type=Path, metavar="FILE", help="a talker.pt or omni.pt instead")
    speak.add_argument("--speed", type=float, default=1.0, help="2.0 halves every duration")
    _add_sampling(speak, "code")
    speak.set_defaults(function=_speak)

    chat = commands.add_parser("chat", help="talk to it in the terminal: text, pictures, recordings")
    _add_omni(chat)
    chat.add_argument("--speak", action="store_true", help="answer aloud as well")
    chat.add_argument("--voice", metavar="NAME", help="a speaker of the training data; by default the clearest")
    chat.add_argument(
        "--out", type=Path, metavar="DIR", help="write spoken answers as WAV files instead of playing them"
    )
    chat.add_argument("--speed", type=float, default=1.0, help="of what is spoken; 2.0 halves every duration")
    chat.add_argument("--max-tokens", type=int, default=64, metavar="N", help="most tokens of an answer (64)")
    _add_sampling(chat, "token")
    chat.set_defaults(function=_chat)

    serve = commands.add_parser("serve", help="a web page to talk to it, and endpoints as OpenAI's API has them")
    _add_omni(serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at; any but this machine's needs --token")
    serve.add_argument("--port", type=int, default=8000, help="8000; 0: any that is free")
    serve.add_argument("--token", help="what every request must bring; by default the environment's OMNI_TOKEN")
    serve.set_defaults(function=_serve)


def _add_omni(command: argparse.ArgumentParser) -> None:
    command.add_argument("--size", default="nano", help="whose omni.pt: that of configs/omni_sft_<size>.json (nano)")
    command.add_argument("--checkpoint", type=Path, metavar="FILE", help="an omni.pt instead")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    command.add_argument(
        "--draft", type=Path, nargs="?", const=Path(), metavar="FILE",
        help="guess ahead with a smaller Thinker: a thinker.pt, or without FILE that of configs/draft_<size>.json",
    )  # fmt: skip


def _draft(words: argparse.Namespace) -> Path | None:
    """The draft that was asked for; the empty path stands for that of the size."""
    return DRAFT.checkpoint(words.size) if words.draft == Path() else words.draft


def _add_sampling(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--temperature", type=float, default=0.0, help=f"0: always the most probable {what} (default)")
    command.add_argument("--top-k", type=int, default=0, help=f"draw from the k most probable {what}s; 0: from all")
    command.add_argument(
        "--top-p", type=float, default=1.0, help=f"draw from the most probable {what}s with this share"
    )
    command.add_argument("--seed", type=int, default=0)


def _run(words: argparse.Namespace) -> int:
    from omni.run import run

    return run(words.size, words.dry_run, words.jobs)


def _evaluate(words: argparse.Namespace) -> int:
    from omni.evaluate.suite import OwnSets, evaluate
    from omni.report import results_table, sets_lines

    own = OwnSets(words.text, words.asr, words.images, words.tts, words.sft)
    results = evaluate(words.size, words.stage, own, words.limit)
    if words.json is not None:
        write_whole(words.json, (json.dumps(results.figures, indent=1) + "\n").encode())
    if words.predictions is not None:
        results.predictions.write(words.predictions)
    if results.figures and not words.quiet:
        print(results_table(results.figures))
        print("\n".join(["", *sets_lines(results.predictions.sets)]))
    for line in results.missing:
        print(line, file=sys.stderr)
    return 1 if results.missing else 0


def _inspect(words: argparse.Namespace) -> int:
    from omni.inspection.plain import inspection_values
    from omni.inspection.runs import inspect
    from omni.inspection.text import inspection_text

    found = inspect(words.path)
    text, values, healthy = inspection_text(found), inspection_values(found), True
    parts: list[str] = []  # of the page
    if words.health:
        from omni.inspection.health import folder_health

        health, values["health"], healthy = folder_health(found)
        text += f"\n\n{health}"
        parts.append(plain_section("Weights", health))
    with tempfile.TemporaryDirectory() as folder:
        if words.samples or words.trace or (words.html is not None and found.what != "folder"):
            from omni.inspection.shown import show

            shown = show(found, Path(folder), words.samples or words.html is not None, words.trace)
            text += f"\n\n{shown.text}" if words.samples or words.trace else ""
            values |= shown.values
            parts += shown.page_parts()
    if words.html is not None:
        from omni.inspection.html import inspection_page

        write_whole(words.html, inspection_page(found, parts).encode())
    print(json.dumps(values, indent=1, allow_nan=False) if words.json else text)
    return 0 if healthy else 1


def _plan(words: argparse.Namespace) -> int:
    from omni.plan_view import plan_text
    from omni.planning import Wish, plan_config

    for option, fits, expected in (
        ("memory", words.memory > 0, "more than 0"),
        ("gpus", words.gpus >= 1, "1 or more"),
        ("seconds", 0 <= words.seconds <= 3600, "0 to 3600"),
    ):
        if not fits:
            raise UserError(f"--{option}: found {getattr(words, option):g}, expected {expected}", exit_code=2)
    wish = Wish(words.memory, words.gpus, words.seconds, words.device)
    plans = []
    for path in words.configs:
        plans.append(plan_config(path, wish))
        if not words.json:
            print(plan_text(plans[-1]), flush=True)
    if words.json:
        print(json.dumps([plan.values() for plan in plans], indent=1, allow_nan=False))
    return 0


def _compare(words: argparse.Namespace) -> int:
    from omni.inspection.comparison import compare
    from omni.inspection.comparison_view import comparison_page, comparison_text, comparison_values

    found = compare(words.runs)
    if words.html is not None:
        write_whole(words.html, comparison_page(found).encode())
    print(json.dumps(comparison_values(found), indent=1, allow_nan=False) if words.json else comparison_text(found))
    return 0


def _speak(words: argparse.Namespace) -> int:
    _check_numbers(words)
    from omni.sampling import Sampling
    from omni.say import Request, say_to_file

    sampling = Sampling(words.temperature, words.top_k, words.top_p, words.seed)
    request = Request(words.text, words.voice, words.reference, sampling, words.speed)
    print(say_to_file(words.checkpoint or stage_of("talker").checkpoint(words.size), request, words.out))
    return 0


def _chat(words: argparse.Namespace) -> int:
    _check_numbers(words)
    from omni.assistant import Voice
    from omni.chat import ChatSettings, chat
    from omni.generate import AnswerSettings
    from omni.sampling import Sampling

    sampling = Sampling(words.temperature, words.top_k, words.top_p, words.seed)
    voice = Voice(words.voice, speed=words.speed)
    settings = ChatSettings(AnswerSettings(words.max_tokens, sampling), voice, words.speak, words.out)
    return chat(words.checkpoint or stage_of("omni").checkpoint(words.size), settings, words.device, _draft(words))


def _serve(words: argparse.Namespace) -> int:
    try:
        from omni.server.app import serve
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("omni"):
            raise
        raise UserError(
            f"`omni serve` needs the package {error.name}; `make setup`, or pip install 'micro-omni[serve]'"
        ) from None
    checkpoint = words.checkpoint or stage_of("omni").checkpoint(words.size)
    token = os.environ.get("OMNI_TOKEN", "") if words.token is None else words.token
    return serve(checkpoint, words.host, words.port, token, words.device, _draft(words))


def _check_numbers(words: argparse.Namespace) -> None:
    """Raise UserError for a number out of its range."""
    for name, fits, expected in (
        ("temperature", lambda x: x >= 0, "0 or more"),
        ("top_k", lambda x: x >= 0, "0 or more"),
        ("top_p", lambda x: 0 < x <= 1, "a share above 0, at most 1"),
        ("seed", lambda x: x >= 0, "0 or more"),
        ("speed", lambda x: 0.25 <= x <= 4, "0.25 to 4"),
        ("max_tokens", lambda x: x >= 1, "1 or more"),
    ):
        if name in words and not fits(getattr(words, name)):
            option = name.replace("_", "-")
            raise UserError(f"--{option}: found {getattr(words, name):g}, expected {expected}", exit_code=2)


def _samples(words: argparse.Namespace) -> int:
    from omni.evaluate.samples import samples_of_size
    from omni.sample import samples_text

    print(samples_text(samples_of_size(words.size, words.stage, words.out, words.count, words.set)))
    return 0


def _synth(words: argparse.Namespace) -> int:
    from omni.data.synthetic import SIZES, synthesize

    if words.size not in SIZES:
        raise UserError(f"--size: found {words.size!r}, expected one of {', '.join(SIZES)}", exit_code=2)
    made = synthesize(words.size, words.out, words.seed)
    state = f"written in {made['seconds']:.0f} s" if made["created"] else "already there, whole"
    counts = ", ".join(f"{sum(made[name].values()):,} {name}" for name in ("documents", "recordings", "pictures"))
    print(f"{made['folder']}: {state}: {counts}")
    return 0


def _speak_data(words: argparse.Namespace) -> int:
    from omni.data.spoken import speak_texts

    if words.sentences < 1:
        raise UserError(f"--sentences: found {words.sentences}, expected 1 or more", exit_code=2)
    if not 0.5 <= words.pace <= 2:
        raise UserError(f"--pace: found {words.pace:g}, expected 0.5 to 2", exit_code=2)
    manifest = speak_texts(words.texts, words.out, words.sentences, words.seed, words.pace)
    rows = len(manifest.read_text(encoding="utf-8").splitlines()) - 1
    print(f"{manifest}: {rows:,} recordings")
    return 0


def _check(words: argparse.Namespace) -> int:
    from omni.data.check import check_configs

    found = check_configs(words.configs)
    for line in found.lines:
        print(line)
    print(f"{len(words.configs)} configurations, {found.num_problems} problems, {found.num_warnings} warnings")
    return 1 if found.num_problems else 0


if __name__ == "__main__":
    sys.exit(main())
