"""One hostile command line, drawn by its seed: a sound one, then one to three things wrong with it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import click
import fuzz_damage as damage
import fuzz_values as values
import fuzz_workshop as workshop

DATA = ("samples.jsonl", "samples.jsonl", "samples.json", "talks.json", "samples.csv", "images", ".")
QUESTION = "what is it"
OUTPUTS = ("out", "profile.json")
MEBIBYTE = 2**20


@dataclass
class Case:
    """A command line and what surrounds it.

    Attributes:
        family: of the model in its folder.
        words: after `slimvlm`.
        environment: variables to set.
        memory: bytes of address space beyond those in use; None: no limit.
        typed: what stands on stdin.
        wrong: what was done, in words.
    """

    seed: int
    family: str
    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    memory: int | None = None
    typed: str = ""
    wrong: list[str] = field(default_factory=list)

    @property
    def command(self) -> str:
        """Its name."""
        return self.words[0]


@dataclass(frozen=True)
class Sound:
    """A command line that works: how often it is drawn, its words, and which files of its folder it reads."""

    weight: int
    words: Callable[[Random], Sequence[str]]
    reads: tuple[str, ...]
    parts: tuple[str, ...] = ()
    whole: bool = False  # needs a family of workshop.WHOLE


def _data(random: Random) -> str:
    return str(Path("data") / random.choice(DATA))


def _cut(random: Random) -> list[str]:
    criterion = random.choice(("magnitude", "magnitude", "gate", "ukmi", "taylor", "fisher", "random"))
    refit = random.choice((["--no-refit"], []))
    return ["--data", _data(random), *workshop.SHORT, "--max-bad-samples", "0.5", "--criterion", criterion, *refit]


def _recovered(random: Random) -> list[str]:
    recipe = random.choice(("none", "none", "sft", "lpd"))
    return ["--recover", recipe, *(workshop.TRAINING if recipe != "none" else ())]


EXPORTED = shlex.split("--exporter torchscript --samples 1 --max-new-tokens 2 --quiet")
MEASURED = shlex.split(
    "--rounds 1 --starts 1 --cell-seconds 0.1 --new-tokens 2 --batch-sizes 1 --no-decoder-tests --threads 1 --quiet"
)

SOUND: dict[str, Sound] = {
    "compress": Sound(
        16,
        lambda random: ["model", "out", *_cut(random), *_recovered(random), "--export", "none"],
        ("model", "data"),
    ),
    "plan": Sound(
        14,
        lambda random: ["model", "out", *(word for word in _cut(random) if word != "--no-profile")],
        ("model", "data"),
    ),
    "apply": Sound(
        7,
        lambda random: ["model", *random.choice((["plan.json"], ["run/plan.json", "--ratio", "0.1"])), "out"],
        ("model", "plan.json", "run"),
        ("plan", "run"),
        True,
    ),
    "recover": Sound(
        8, lambda random: ["run", "--recover", "sft", *workshop.TRAINING, "--quiet"], ("run", "data"), ("run",), True
    ),
    "evaluate": Sound(
        18,
        lambda random: ["model", "--data", _data(random), "--eval-samples", "4", "--max-bad-samples", "0.5", "--quiet"],
        ("model", "data"),
    ),
    "inspect": Sound(10, lambda _: ["model"], ("model",)),
    "export": Sound(
        8,
        lambda random: random.choice((["model", "out", *EXPORTED], ["exported", "--verify"])),
        ("model", "exported"),
        ("exported",),
        True,
    ),
    "profile": Sound(
        3,
        lambda random: [
            random.choice(("model", "run", "exported")), "--out", "profile.json", *MEASURED,
            "--backend", random.choice(("torch", "onnx", "torchscript")),
        ],
        ("model", "run", "exported"),
        ("run", "exported"),
        True,
    ),
    "chat": Sound(
        14,
        lambda random: [random.choice(("model", "model", "exported")), "data/0.png", QUESTION, "--max-new-tokens", "3"],
        ("model", "data/0.png", "exported"),
        ("exported",),
        True,
    ),
    "report": Sound(8, lambda _: ["run"], ("run",), ("run",), True),
    "kernels": Sound(1, lambda _: ["--device", "nowhere"], ()),
    "demo": Sound(2, lambda _: ["data"], ()),  # a folder with other files: refused before its minutes begin
}  # fmt: skip
LIKELY = (
    *("config.json", "model.safetensors", "samples.jsonl", "run.json", "plan.json", "order.safetensors"),
    *("quality.json", "manifest.json"),
)


def draw(seed: int, base: Path, folder: Path, families: Sequence[str]) -> Case:
    """Case number `seed`, its files laid out in the empty `folder`."""
    random = Random(seed)
    name = random.choices(list(SOUND), [one.weight for one in SOUND.values()])[0]
    sound = SOUND[name]
    known = [family for family in families if family in workshop.WHOLE] if sound.whole else families
    case = Case(seed, random.choice(known), [name, *sound.words(random)])
    workshop.lay_out(base, folder, case.family, sound.parts)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        way = random.choices((_file, _option, _path, _around, _typed), (14, 5, 2, 1.2, 0.6))[0]
        if said := way(case, sound, folder, random):
            case.wrong.append(said)
    return case


def _file(case: Case, sound: Sound, folder: Path, random: Random) -> str:
    """Damage a file that the command reads."""
    read = [folder / name for name in sound.reads if (folder / name).exists()]
    if "model" in sound.reads and random.random() < 0.03:
        return damage.adapter(folder / "model", random) if (folder / "model/model.safetensors").is_file() else ""
    files = [file for path in read for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    files = [file for file in files if file.is_file() and not file.is_symlink()]
    likely = [file for file in files if file.name in LIKELY]
    chosen = random.choice(likely if likely and random.random() < 0.5 else files) if files else None
    try:
        return damage.damage(chosen, random) if chosen else ""
    except Exception as error:  # damaged before: nothing is left to damage in this way
        return f"({type(error).__name__} while damaging {chosen})"


def _option(case: Case, sound: Sound, folder: Path, random: Random) -> str:
    """Give an option any value, or a flag."""
    from slimvlm.cli import main

    options: list[Any] = [one for one in main.commands[case.command].params if isinstance(one, click.Option)]
    if not options:
        return ""
    option = random.choice(options)
    flag = random.choice([*option.opts, *option.secondary_opts])
    if option.is_flag and random.random() < 0.9:
        case.words.append(flag)
        return flag
    own = list(getattr(option.type, "choices", ()))
    value = values.word(random, option.opts[0], own)
    if isinstance(option.type, click.Path):
        value = random.choice((*values.PATHS, "data", "data/samples.jsonl", "model", "data/0.png"))
    case.words += [flag, value]
    return f"{flag} {value[:60]!r}"


def _path(case: Case, sound: Sound, folder: Path, random: Random) -> str:
    """Name another path in the place of one."""
    places = [
        place
        for place, word in enumerate(case.words)
        if place and case.command != "demo" and (os.path.exists(folder / word.split("/")[0]) or word in OUTPUTS)  # noqa: PTH110 (too long a name is none)
    ]
    if not places:
        return ""
    place = random.choice(places)
    case.words[place] = random.choice((*values.PATHS, "model", "data", "run", "exported", "plan.json", "out"))
    return f"word {place} is {case.words[place][:60]!r}"


def _around(case: Case, sound: Sound, folder: Path, random: Random) -> str:
    """Another environment, or little memory."""
    if random.random() < 0.3:
        case.memory = random.choice((4, 32, 64, 128)) * MEBIBYTE
        return f"{case.memory // MEBIBYTE} MiB more"
    name = random.choice(list(values.ENVIRONMENT))
    case.environment[name] = random.choice(values.ENVIRONMENT[name])
    return f"{name}={case.environment[name]!r}"


def _typed(case: Case, sound: Sound, folder: Path, random: Random) -> str:
    """Lines typed to chat, or words that are too many or too few."""
    if case.command == "chat" and QUESTION in case.words:
        case.words.remove(QUESTION)
        case.typed = random.choice(
            ("what\n/image pipe\n", "\udcff\n", "/image \0\nwhat\n", "<image>\n", "red " * 3000 + "\n", "/image \n", "")
        )
        return f"typed {case.typed[:40]!r}"
    if random.random() < 0.5 and len(case.words) > 1:
        return f"without {case.words.pop(1)!r}"
    case.words.append(os.fsdecode(random.choice((b"x", b"", b"\xff", b"--nothing", b"--json"))))
    return f"also {case.words[-1]!r}"
