"""The commands: parse, one library call, print. Nothing heavy is imported before a command runs.

Exit codes: 0 done, 1 a bug (traceback), 2 usage, 3 refused, 4 a check failed (files are kept), 130 interrupted.
"""

from __future__ import annotations

import os

import click

from slimvlm.console.commands import checking, comparing, cutting, delivering, studying
from slimvlm.console.group import Commands
from slimvlm.console.printing import print_warning
from slimvlm.console.progress import print_anything
from slimvlm.export.running.runtimes import installed_runtimes, runtime_conflict


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 120},
)
@click.version_option(package_name="slimvlm")
def main() -> None:
    """Turn a vision-language model into a smaller dense one."""
    # transformers' own bars and notes would run into ours; its errors still show.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    print_anything()
    if conflict := runtime_conflict(installed_runtimes()):
        print_warning(conflict)


for command in (  # the most wanted first
    cutting.compress,
    comparing.frontier,
    studying.study,
    cutting.demo,
    cutting.plan,
    cutting.apply,
    cutting.recover,
    cutting.sparsify,
    comparing.evaluate,
    checking.inspect,
    studying.advise,
    delivering.export,
    delivering.quantize,
    comparing.profile,
    delivering.chat,
    delivering.report,
    delivering.push,
    checking.kernels,
    checking.selfcheck,
):
    main.add_command(command)


if __name__ == "__main__":
    main()
