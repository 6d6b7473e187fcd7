"""The group of the commands: their order, and what becomes of errors; and the panels of their help pages."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import click

from slimvlm.compress.errors import (
    CheckFailedError,
    SlimvlmError,
    UnsuitableOptionError,
    is_out_of_memory,
    one_line,
)

SHARED = ("compress", "plan")  # commands that several processes are one job in


class Refused(click.ClickException):
    """An expected failure of the library."""

    exit_code = SlimvlmError.exit_code


class CheckFailed(Refused):
    """A result that was made, and is not what it should be."""

    exit_code = CheckFailedError.exit_code


class Interrupted(click.ClickException):
    """Ctrl-C; what was finished stays."""

    exit_code = 130


class Commands(click.Group):
    """Commands in the order they were added in; what the library refuses becomes a message and an exit code in each."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, the most wanted first."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        gc.set_threshold(10_000)  # torch and transformers make half a million objects, which stay
        try:
            return self._invoke(ctx)
        except CheckFailedError as error:
            raise CheckFailed(str(error)) from error
        except SlimvlmError as error:
            raise Refused(str(error)) from error
        except KeyboardInterrupt:
            raise Interrupted("interrupted; what was finished is kept") from None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise Refused(
                f"memory ended ({one_line(error)}); free some, or take less at once (--batch-size, --grad-memory, a "
                "smaller model); what was finished is kept"
            ) from error

    def _invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            if ctx.invoked_subcommand in SHARED and os.environ.get("WORLD_SIZE", "1") != "1":
                _refuse_together(error.format_message())
            raise


def _refuse_together(why: str) -> NoReturn:
    """Tell the other processes, which would wait for this one: it may be the only one that lacks a file."""
    from slimvlm.compress import processes

    with processes.joined():
        raise UnsuitableOptionError(f"process {processes.rank()} on {socket.gethostname()} refuses its options: {why}")


class PanelOption(click.Option):
    """An option that help pages show in the panel of this name."""

    def __init__(self, *flags: Any, panel: str = "Options", **settings: Any) -> None:
        super().__init__(*flags, **settings)
        self.panel = panel


class PanelCommand(click.Command):
    """A command whose help page has its options in panels.

    Args:
        first: flags of those that most users need: `--help` shows them alone, so that it fits a terminal, and names the
            others; `--help-all` shows all.
    """

    def __init__(self, *args: Any, first: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.first = first
        self.help_all = click.Option(
            ["--help-all"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_show_all,
            help="Show all options.",
        )

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Those of click, and `--help-all` where `--help` is not all."""
        *own, asked_for_help = super().get_params(ctx)
        return [*own, *([self.help_all] if self.first else []), asked_for_help]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """All options in their panels; or the first ones, and the names of the others."""
        panels = dict[str, list[click.Option]]()
        for one in self.get_params(ctx):
            if isinstance(one, click.Option):
                panels.setdefault(one.panel if isinstance(one, PanelOption) else "Help", []).append(one)
        if sum(map(len, panels.values())) < _MANY:
            panels = {"Options": [one for options in panels.values() for one in options]}
        if not self.first or ctx.meta.get(_ALL):
            for title, options in panels.items():
                _write(formatter, title, [one.get_help_record(ctx) for one in options])
            return
        shown = [one for options in panels.values() for one in options if one.opts[0] in (*self.first, "--help-all")]
        _write(formatter, "Most wanted options", [one.get_help_record(ctx) for one in shown])
        left = {title: [one.opts[0] for one in options if one not in shown] for title, options in panels.items()}
        _write(formatter, "All others", [(title, _some(flags)) for title, flags in left.items() if title != "Help"])


_ALL = "slimvlm.help-all"
_MANY = 14  # options; fewer are in one panel
_NAMED = 2  # of a panel that is not shown


def _some(flags: Sequence[str]) -> str:
    return ", ".join(flags[:_NAMED]) + (f" and {len(flags) - _NAMED} more" if len(flags) > _NAMED else "")


def _write(formatter: click.HelpFormatter, title: str, rows: Sequence[tuple[str, str] | None]) -> None:
    with formatter.section(title):
        formatter.write_dl([row for row in rows if row and row[1]])


def _show_all(ctx: click.Context, _option: click.Parameter, asked: bool) -> None:
    if asked:
        ctx.meta[_ALL] = True
        click.echo(ctx.get_help())
        ctx.exit()


command = partial(click.command, cls=PanelCommand)
