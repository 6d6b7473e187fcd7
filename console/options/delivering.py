"""The options of what is made of a model: evaluations, exports, profiles, run folders; and of all in one command."""

from __future__ import annotations

import click

from slimvlm.compress.options import CompressOptions
from slimvlm.console.options.cutting import (
    cost_option,
    ranking_options,
    ratio_option,
    removal_options,
    rounds_option,
    sample_options,
    samples_option,
    split_option,
    target_option,
)
from slimvlm.console.options.making import (
    COUNT,
    DATA,
    EVALUATION,
    FILE_OR_FOLDER,
    NAME,
    OUTPUTS,
    PATH,
    POSITIVE,
    RECOVERY,
    REMOVED,
    SEED,
    TEXT,
    defaulting_to,
    model_options,
    output_options,
    panel,
    remote_code,
    stream_option,
    together,
)
from slimvlm.console.options.recipe import recipe_options
from slimvlm.console.options.recovering import recover_option, recover_options, steps_option, train_batch_option
from slimvlm.console.options.values import Count, ImageSize, Listed, Names, Number
from slimvlm.export.options import DTYPES as EXPORTED_DTYPES
from slimvlm.export.options import EXPORTERS, FUSIONS, ExportOptions
from slimvlm.export.variants import QUANTIZED
from slimvlm.serve.frontier.options import FrontierOptions
from slimvlm.serve.options import BACKENDS

option, export_option, frontier_option = map(defaulting_to, (CompressOptions, ExportOptions, FrontierOptions))
WRITTEN, CHECKED, FRONTIER = "What is written", "How it is checked", "What is measured"

evaluation_options = panel(
    EVALUATION,
    option(
        "--eval-data",
        type=FILE_OR_FOLDER,
        help="Samples for before and after, kept out of all else; else a part of --data.",
    ),
    option("--eval-samples", type=COUNT, help="At most so many of them."),
)
samples_limit = panel(DATA, option("--eval-samples", type=COUNT, help="At most so many samples."))
quality_limit = panel(
    EVALUATION,
    option("--max-quality-drop", type=Number(min=0), metavar="POINTS", help="Exit with 4 if quality falls by more."),
)
formats_option = panel(
    OUTPUTS,
    option(
        "--export", type=Names(), metavar="NAMES", help="Of onnx, torchscript, pt2, or none; else what is installed."
    ),
)
precision_options = panel(
    OUTPUTS,
    option("--variants", type=Names(), metavar="NAMES", default=(), help="Precisions to choose among, or to export."),
    option("--backend", type=click.Choice(BACKENDS), help="What the targets are measured with."),
)
profile_stage_option = panel(
    OUTPUTS, option("--profile/--no-profile", default=True, help="Measure latency and memory at the end.")
)
private_option = panel(OUTPUTS, option("--private", is_flag=True, help="Make the repository on the Hub a private one."))
push_options = together(
    panel(
        OUTPUTS,
        option("--push-to-hub", type=TEXT, metavar="REPO", help="Upload the checkpoint as OWNER/NAME at the end."),
    ),
    private_option,
)
folder_options = panel(
    OUTPUTS,
    option("--resume", is_flag=True, help="Go on after the last finished stage of a run."),
    option("--overwrite", is_flag=True, help="Replace an earlier run."),
)
dry_run_option = panel(
    OUTPUTS, option("--dry-run", is_flag=True, help="Say what would be done, how long it takes, and do nothing.")
)
export_options = together(
    panel(
        WRITTEN,
        option("--format", "formats", type=Names(), metavar="NAMES", default="onnx", help="onnx, torchscript, pt2."),
        export_option("--dtype", type=click.Choice(EXPORTED_DTYPES), help="Of weights and cache."),
        export_option(
            "--quantize", type=click.Choice(QUANTIZED), help="A second set of ONNX graphs, with such weights."
        ),
        export_option("--variants", type=Names(), metavar="NAMES", help="All to write, as fp32,int8,q4."),
        export_option("--opset", type=Count(), help="Of the ONNX graphs."),
        export_option("--exporter", type=click.Choice(EXPORTERS), help="auto falls back to torchscript."),
        export_option("--fuse", type=click.Choice(FUSIONS), help="ONNX Runtime's fused operators for this device."),
        export_option("--image-size", type=ImageSize(), metavar="HxW", help="Of families with one fixed grid."),
        export_option("--aoti", is_flag=True, help="Compile the torch.export programs (needs a C++ compiler)."),
        export_option("--bundle", is_flag=True, help="Add a README, and the folder as OUT.tar."),
        export_option("--overwrite", is_flag=True, help="Replace an earlier export."),
    ),
    panel(
        CHECKED,
        export_option("--data", type=FILE_OR_FOLDER, help="Samples to check with; else generated images."),
        export_option("--samples", type=COUNT, help="So many of them are generated for."),
        export_option("--max-new-tokens", type=COUNT, help="Longest generation in these checks."),
        export_option("--seed", type=SEED, help="Of the choice of samples."),
    ),
    stream_option,
    panel(DATA, remote_code),
    recipe_options,
)
frontier_options = together(
    click.argument("model", type=NAME),
    click.argument("out", type=PATH),
    sample_options,
    model_options,
    panel(
        REMOVED,
        frontier_option(
            "--ratios",
            type=Listed(Number(0, 1, max_open=True)),
            metavar="R,R",
            help="Fractions of ALL parameters to remove; the dense model is always measured.",
        ),
        samples_option,
        rounds_option,
    ),
    panel(RECOVERY, recover_option, steps_option, train_batch_option),
    panel(
        FRONTIER,
        frontier_option("--variants", type=Names(), metavar="NAMES", help="Precisions of every cut."),
        frontier_option(
            "--exporter", type=click.Choice(EXPORTERS), help="As of export; torchscript is the faster one."
        ),
        frontier_option("--times/--no-times", help="Without: sizes and quality; --resume takes the times."),
        frontier_option(
            "--minutes", type=POSITIVE, help="Begin no cut that would end later; the most telling come first."
        ),
        frontier_option("--target", multiple=True, type=TEXT, metavar="NAME=AMOUNT", help="Name the best under it."),
        frontier_option("--threads", type=COUNT, help="On the CPU; else as many as physical cores."),
    ),
    evaluation_options,
    folder_options,
    output_options,
)
cut_options = together(
    click.argument("model", type=NAME),
    click.argument("out", type=PATH),
    sample_options,
    split_option,
    model_options,
    stream_option,
    ratio_option,
)
plan_options = together(
    cut_options, recipe_options, removal_options, ranking_options, evaluation_options, folder_options, output_options
)
compress_options = together(
    cut_options,
    recipe_options,
    target_option,
    removal_options,
    ranking_options,
    cost_option,
    recover_options,
    evaluation_options,
    quality_limit,
    formats_option,
    precision_options,
    profile_stage_option,
    push_options,
    folder_options,
    dry_run_option,
    output_options,
)
demo_options = together(
    click.argument("out", type=PATH),
    panel(DATA, option("--seed", type=SEED, help="Of the choice of samples.")),
    ratio_option,
    recover_option,
    steps_option,
    quality_limit,
    formats_option,
    profile_stage_option,
    folder_options,
    output_options,
)
