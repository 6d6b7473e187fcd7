"""`optimum-cli slimvlm ...`, for those who look there: every command of slimvlm, as it is typed.

optimum imports whatever lies in its namespace `optimum.commands.register`, which this folder is installed as
(`package-dir` in pyproject.toml); it has no `__init__.py`, because others' files are in that namespace too. Nothing
of slimvlm is imported before it is asked for: optimum reads this file at every start.
"""

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class SlimvlmCommand(BaseOptimumCLICommand):
    """Hands all that follows to the click commands, whose options are the only ones there are."""

    COMMAND = CommandInfo(name="slimvlm", help="Compress, export and profile a vision-language model.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Take everything, `--help` too: without prefix characters there are no options."""
        parser.prefix_chars = ""
        parser.add_argument("words", nargs=REMAINDER)

    def run(self) -> None:
        """Run the command; it ends the process with its own exit code."""
        from slimvlm.cli import main

        main(args=self.args.words, prog_name="optimum-cli slimvlm")


REGISTER_COMMANDS = [SlimvlmCommand]
