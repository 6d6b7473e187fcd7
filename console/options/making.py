"""How options are made: with the defaults of the library's dataclasses, in the panels of help pages."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import click

from slimvlm.compress.options import STREAM, TRUST_DISCOVERED, ComputeOptions
from slimvlm.console.group import PanelOption
from slimvlm.console.options.values import Count, Device, Location, Name, Number, Text
from slimvlm.serve.options import DTYPES

# Panels that several commands have.
DATA, REMOVED, RANKED = "Model and data", "What to remove", "How it is ranked"
RECOVERY, TRAINING = "Recovery", "Training in the recovery"
EVALUATION, OUTPUTS = "Evaluation", "Outputs"

PATH = Location()
FILE = Location(exists=True, dir_okay=False)
FILE_OR_FOLDER = Location(exists=True)
FOLDER = Location(exists=True, file_okay=False)
NAME = Name()
TEXT = Text()
COUNT = Count()
SEED = Count(0, 2**32 - 1)
FRACTION = Number(0, 1)
RATIO = Number(0, 1, min_open=True, max_open=True)
RATIO_OR_ALL = Number(0, 1, min_open=True)
POSITIVE = Number(0, min_open=True)

Decorator = Callable[..., Any]  # of a command's function; takes the panel the option is in


def option(*flags: str, **settings: Any) -> Decorator:
    """As `click.option`, for a panel."""
    settings.setdefault("cls", PanelOption)

    def decorate(command: Any, **panel: Any) -> Any:
        return click.option(*flags, **settings, **panel)(command)

    return decorate


def defaulting_to(options: type[Any]) -> Callable[..., Decorator]:
    """As `option`, with the defaults of the library's `options`."""
    defaults = {field.name: field.default for field in fields(options)}

    def defaulting(flag: str, *name: str, **settings: Any) -> Decorator:
        default = defaults.get(flag.split("/")[0].removeprefix("--").replace("-", "_"))
        if isinstance(default, str | int | float | tuple):
            settings.setdefault("default", default)
        return option(flag, *name, **settings)

    return defaulting


def together(*options: Decorator) -> Decorator:
    """Several options as one decorator, shown in this order."""

    def decorate(command: Any, **panel: str) -> Any:
        for option in reversed(options):
            command = option(command, **panel)
        return command

    return decorate


def panel(title: str, *options: Decorator) -> Decorator:
    """Options in the panel `title`, as one decorator."""
    return together(*(partial(option, panel=title) for option in options))


compute_option = defaulting_to(ComputeOptions)
device_option = compute_option("--device", type=Device(), metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")


def _trust_discovered(context: click.Context, _option: click.Parameter, asked: bool) -> None:
    """For as long as the command runs, here and in the processes that it starts."""
    if asked and TRUST_DISCOVERED not in os.environ:
        os.environ[TRUST_DISCOVERED] = "1"
        context.call_on_close(partial(os.environ.pop, TRUST_DISCOVERED))


remote_code = together(
    option("--trust-remote-code", is_flag=True, help="Run Python code that the checkpoint brings."),
    option(
        "--trust-discovered",
        is_flag=True,
        expose_value=False,
        callback=_trust_discovered,
        help="Of a model type without a row, cut what `inspect --discover` finds.",
    ),
)
json_option = panel(OUTPUTS, option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."))
output_options = together(
    json_option, panel(OUTPUTS, option("--quiet", "-q", is_flag=True, help="No progress on stderr."))
)
model_options = panel(
    DATA,
    device_option,
    compute_option("--dtype", type=click.Choice(DTYPES), help="Type of the weights; auto is the checkpoint's own."),
    remote_code,
)
stream_option = panel(
    DATA,
    compute_option(
        "--stream", type=click.Choice(STREAM), help="Read the model block by block; auto: where it would not fit."
    ),
)
again_options = panel(DATA, device_option, remote_code)  # what a run does not remember
