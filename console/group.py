"""The group of the commands: their order, and what becomes of errors."""

from __future__ import annotations

import gc
from typing import Any

import click

from slimvlm.compress.errors import CheckFailedError, SlimvlmError, is_out_of_memory, one_line


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
            return super().invoke(ctx)
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
