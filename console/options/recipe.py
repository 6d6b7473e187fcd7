"""A file with the options of a command, which `--config` reads and `--write-config` writes; a `run.json` is one."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any  # values of options of all types

import click

from slimvlm.compress.errors import OutputError, UnsuitableOptionError
from slimvlm.compress.files.decoding import refused_as
from slimvlm.compress.run_record import RECORD, read_record, replayed
from slimvlm.console.group import PanelOption
from slimvlm.console.options.making import FILE, FILE_OR_FOLDER, NAME, PATH, option, panel
from slimvlm.console.options.reading import known_keys, read_document, told_value, word

ADVICE = "slimvlm {} --write-config shows all options there are"
STDOUT = "-"
ARGUMENTS = ("model", "out")
WIDTH = 110  # columns of a comment


class Recipe(PanelOption):
    """`--config FILE`: where the command line says nothing, an option has the value it has in the file."""

    def handle_parse_result(self, ctx: click.Context, opts: Any, args: list[str]) -> tuple[Any, list[str]]:
        """Read the file. One that names the model leaves the first argument to the place that is written to."""
        path, args = super().handle_parse_result(ctx, opts, args)
        if isinstance(path, Path) and not ctx.resilient_parsing:
            ctx.default_map = read_recipe(path, ctx.command)
            given = [isinstance(opts.get(name), str) for name in ARGUMENTS]
            if "model" in ctx.default_map and given == [True, False] and _has(ctx.command, "out"):
                opts["out"] = opts.pop("model")
        return path, args


class RecipeWriter(PanelOption):
    """`--write-config [FILE]`: write what was given, and all else as a comment with its default; do nothing more."""

    def handle_parse_result(self, ctx: click.Context, opts: Any, args: list[str]) -> tuple[Any, list[str]]:
        """Write the file, after --config was read."""
        target, args = super().handle_parse_result(ctx, opts, args)
        if isinstance(target, Path) and not ctx.resilient_parsing:
            for one in ctx.command.params:
                if isinstance(one, Recipe):
                    one.handle_parse_result(ctx, opts, args)
            _write(ctx, opts, target)
            ctx.exit()
        return target, args


def read_recipe(path: Path, command: click.Command) -> dict[str, Any]:
    """What the file says, by the names of the command's parameters, each as the command line would say it.

    Raises:
        UnsuitableOptionError: it cannot be read; or the place in it that says what nothing can take; or it is the
            record of a run, and the command begins none.
        OutputError: it is the record of a run, and damaged.
    """
    is_run = path.name == RECORD
    # A run's paths are as they were typed, in the folder it was started in.
    folder = Path() if is_run else path.parent
    by_key = {word(one).replace("-", "_"): one for one in recipe_parameters(command)}
    if is_run and not _has(command, "ratio"):
        raise UnsuitableOptionError(
            f"{path} has the options of slimvlm compress, which are not those of {command.name}; "
            + ADVICE.format(command.name)
        )
    with refused_as(path, UnsuitableOptionError, ADVICE.format(command.name)):
        if is_run:  # it says what later stages do, too
            told = {key: value for key, value in replayed(read_record(path.parent)).items() if key in by_key}
        else:
            told = known_keys(read_document(path), by_key)
        return {str(by_key[key].name): told_value(folder, by_key[key], value) for key, value in told.items()}


def _has(command: click.Command, name: str) -> bool:
    return any(one.name == name for one in command.params)


def recipe_parameters(command: click.Command) -> list[click.Parameter]:
    """The arguments and options that a file can say: of several flags of one parameter the first."""
    found: dict[str | None, click.Parameter] = {}
    for one in command.params:
        if not one.is_eager:
            found.setdefault(one.name, one)
    return list(found.values())


def _write(ctx: click.Context, opts: Mapping[str, Any], path: Path) -> None:
    text = "\n".join(_lines(ctx, opts, path.parent)) + "\n"
    if str(path) == STDOUT:
        click.echo(text, nl=False)
        return
    if path.exists():
        raise OutputError(f"{path} exists; name another file, or remove it")
    from slimvlm.compress.files.writing import write_text  # safetensors takes its time to import

    write_text(path, text)
    click.echo(f"{path} written; run it with slimvlm {ctx.command.name} --config {path}")


def _lines(ctx: click.Context, opts: Mapping[str, Any], folder: Path) -> Iterator[str]:
    name, title = ctx.command.name, ""
    yield f"# slimvlm {name} --config FILE"
    yield "# A line that is commented out has the default shown; the command line comes before this file."
    yield "# Paths are as seen from the folder of this file."
    for one in recipe_parameters(ctx.command):
        if isinstance(one, PanelOption) and one.panel != title:
            title = one.panel
            yield f"\n# ==== {title} ===="
        yield ""
        record = one.get_help_record(ctx) if isinstance(one, click.Option) else None
        said = "  ".join(record) if record else str(one.human_readable_name)
        yield from textwrap.wrap(said, WIDTH, initial_indent="# ", subsequent_indent="#     ")
        value, source = one.consume_value(ctx, opts)
        if source in (click.core.ParameterSource.COMMANDLINE, click.core.ParameterSource.DEFAULT_MAP):
            yield f"{word(one)} = {_toml(_seen_from(folder, one, one.process_value(ctx, value)))}"
        else:
            yield f"# {word(one)} = {_toml(one.get_default(ctx))}".rstrip()


def _seen_from(folder: Path, one: click.Parameter, value: Any) -> Any:
    """A path as it is written in a file in `folder`; a name that is no path here stays one."""
    if one.type in (PATH, FILE_OR_FOLDER) or (one.type is NAME and Path(value).exists()):
        return value if Path(value).is_absolute() else os.path.relpath(value, folder)
    return value


def _toml(value: Any) -> str:
    """A value as TOML writes it; nothing where there is none."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value) if isinstance(value, bool | int | float) else ""


recipe_options = panel(
    "Options in a file",
    option(
        "--config",
        cls=Recipe,
        type=FILE,
        is_eager=True,
        expose_value=False,
        help="Options from TOML or a run.json; the command line wins.",
    ),
    option(
        "--write-config",
        cls=RecipeWriter,
        type=PATH,
        metavar="[FILE]",
        is_flag=False,
        flag_value=STDOUT,
        is_eager=True,
        expose_value=False,
        help="Write such a file, with what is given and all else as comments, and do nothing more.",
    ),
)
