"""What is measured of models, one beside the other."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from slimvlm.compress.options import CutOptions, EvaluateOptions
from slimvlm.console import show, show_frontier, show_profile
from slimvlm.console.group import command
from slimvlm.console.options.cutting import sample_options
from slimvlm.console.options.delivering import frontier_options, samples_limit
from slimvlm.console.options.making import DATA, NAME, model_options, option, output_options, panel, stream_option
from slimvlm.console.options.measuring import profile_options
from slimvlm.console.options.recipe import recipe_options
from slimvlm.console.progress import progress, show_job
from slimvlm.serve.frontier.options import OWN, FrontierOptions
from slimvlm.serve.options import ProfileOptions


@command(
    first=(
        *("--data", "--ratios", "--variants", "--times", "--minutes", "--target", "--recover"),
        *("--eval-data", "--device", "--resume"),
    )
)
@frontier_options
def frontier(as_json: bool, quiet: bool, **values: Any) -> None:
    """Measure what MODEL can do, over its size and its time, cut and quantised in many ways.

    One calibration for all cuts; each, in each precision, is evaluated and timed on this device:

        slimvlm frontier ./my-vlm out --data samples.jsonl --ratios 0.2,0.35,0.5 --target size=3MB
    """
    from slimvlm.serve.frontier.job import measure_frontier
    from slimvlm.serve.report import write_frontier_report

    own = {name: values.pop(name) for name in OWN}
    options = FrontierOptions(cut=CutOptions(**values), **own)
    with progress(quiet) as report:
        found = measure_frontier(options, report)
    show_frontier.show_frontier(found, write_frontier_report(options.out), as_json=as_json)


@command(first=("--data", "--against", "--eval-samples", "--batch-size", "--device", "--dtype", "--config"))
@click.argument("model", type=NAME)
@sample_options
@samples_limit
@panel(DATA, option("--against", type=NAME, metavar="MODEL", help="Compare with this one on the same samples."))
@model_options
@stream_option
@recipe_options
@output_options
def evaluate(against: str | None, as_json: bool, quiet: bool, **values: Any) -> None:
    """Measure how well MODEL answers.

    Share of right answers per task, the loss of the right answers' tokens, and what is right with the images shuffled.
    MODEL is a checkpoint or an export, FOLDER[:BACKEND[:VARIANT]]:

        slimvlm evaluate exported:onnx:int8 --data test.jsonl --against ./my-vlm

    With --stream on a checkpoint is read block by block, and its answers are forced: each token has the right ones
    before it.
    """
    from slimvlm import pipeline

    with progress(quiet) as report:
        options = EvaluateOptions(**values)
        evaluation = pipeline.evaluate_named(options, against, report)
    show.show_quality(evaluation, options.seed, as_json=as_json)


@command(
    first=("--against", "--backend", "--device", "--batch-sizes", "--new-tokens", "--data", "--max-ttft-ms", "--out")
)
@click.argument("slim", type=NAME)
@profile_options
@recipe_options
@output_options
def profile(as_json: bool, quiet: bool, **values: Any) -> None:
    """Measure what SLIM costs to run, next to a dense model.

    SLIM is a checkpoint, what `slimvlm compress` wrote, or an export; FOLDER:BACKEND[:VARIANT] runs on that alone, and
    so does --against. Both models take turns in processes of their own:

        slimvlm profile out --against ./my-vlm --backend torch,onnx
        slimvlm profile out:onnx:int8 --against ./my-vlm:onnx:int8
    """
    from slimvlm.serve.profiling import profile_models

    options = ProfileOptions(**values)
    shown = partial(show_profile.show_profile, written=options.written, as_json=as_json)
    show_job(partial(profile_models, options), shown, quiet)
