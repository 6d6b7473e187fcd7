"""How methods are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slimvlm.console.commands.study_file import read_cells
from slimvlm.console.group import command
from slimvlm.console.options.cutting import ratio_option
from slimvlm.console.options.making import (
    COUNT,
    FILE,
    NAME,
    PATH,
    TEXT,
    json_option,
    option,
    output_options,
    remote_code,
)
from slimvlm.console.options.values import Count
from slimvlm.console.printing import print_json
from slimvlm.console.progress import progress
from slimvlm.console.show_study import show_advice, show_study, work_words
from slimvlm.serve.advising.rules import WANTS
from slimvlm.serve.study.choosing import CHOSEN_BY
from slimvlm.serve.study.options import StudyOptions


@command()
@click.argument("config", type=FILE)
@click.argument("out", type=PATH, required=False)
@option("--processes", type=COUNT, default=1, help="So many measure side by side.")
@option("--best-by", type=click.Choice(CHOSEN_BY), default=CHOSEN_BY[0], help="What the best rows are chosen by.")
@option("--report-test", type=TEXT, multiple=True, metavar="ROW", help="Then ask this row the test questions; or best.")
@option("--retry", is_flag=True, help="Measure again what failed or missed its ratio.")
@option("--keep-models", is_flag=True, help="Leave the cut models in OUT.")
@option("--dry-run", is_flag=True, help="Say what there is to do and how long it takes, and do nothing.")
@output_options
def study(config: Path, out: Path | None, dry_run: bool, as_json: bool, quiet: bool, **values: Any) -> None:
    """Compare methods over a grid: criteria, allocators, ratios, recoveries, sets, models.

    CONFIG (TOML or JSON) names models with their samples and rows of options of `slimvlm compress`, docs/study.md says
    how. OUT/results.jsonl has a line per cell; the same command goes on where it was interrupted:

        slimvlm study benchmarks/studies/demo.toml out --processes 2
    """
    cells = read_cells(config)
    options = StudyOptions(out=out or Path(f"{config.stem}-study"), cells=cells, **values).checked()
    left, seconds = options.left()
    if dry_run and as_json:
        print_json({"cells": len(cells), "left": left, "seconds": seconds})
        return
    if dry_run or not quiet:
        click.echo(work_words(left, len(cells), seconds, options.processes), err=not dry_run)
    if dry_run:
        return
    from slimvlm.serve.report import write_study_report
    from slimvlm.serve.study.job import run_study

    with progress(quiet) as report:
        rows = run_study(options, report)
    show_study(rows, options.best_by, write_study_report(options.out, options.best_by), as_json=as_json)


@command()
@click.argument("model", type=NAME)
@ratio_option
@option("--samples", type=Count(0), required=True, help="That there are to train with; 0: none, or no time to.")
@option("--want", type=click.Choice(WANTS), default=WANTS[0], help="What counts most at this size.")
@remote_code
@json_option
def advise(model: str, as_json: bool, **values: Any) -> None:
    """Say which method to use on MODEL, and why.

    The decision rules of VLMCompression with what its study measured, and our own figures beside them. Reads the
    model's config, no weights:

        slimvlm advise ./my-vlm --ratio 0.3 --samples 50000
    """
    from slimvlm.serve.advising.advising import advise_model

    show_advice(advise_model(model, **values), as_json=as_json)
