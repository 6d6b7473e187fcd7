"""The options of a profile, and of a cost; their names and defaults are those of `ProfileOptions` and `Asked`."""

from __future__ import annotations

import click

from slimvlm.console.options.making import (
    COUNT,
    FILE_OR_FOLDER,
    NAME,
    OUTPUTS,
    PATH,
    POSITIVE,
    RATIO,
    SEED,
    defaulting_to,
    panel,
    remote_code,
    together,
)
from slimvlm.console.options.values import Device, ImageSize, Listed, Names, Size
from slimvlm.serve.costing.asked import Asked
from slimvlm.serve.costing.machines import MACHINES
from slimvlm.serve.options import DTYPES, PROVIDERS, ProfileOptions

option = defaulting_to(ProfileOptions)

profile_options = together(
    panel(
        "What is measured",
        option("--against", type=NAME, metavar="MODEL", help="The dense model; else SLIM is measured alone."),
        option(
            "--backend",
            type=Names(),
            metavar="NAMES",
            help="torch, onnx, torchscript; a variant as onnx:int8, torch:int4.",
        ),
        option("--device", type=Device(), metavar="DEVICE", help="auto, cpu, cuda or cuda:N."),
        option("--provider", type=click.Choice(PROVIDERS), help="Of ONNX Runtime; auto is the device's own."),
        option("--threads", type=COUNT, help="On the CPU; else as many as physical cores."),
        option("--dtype", type=click.Choice(DTYPES), help="Of the torch models; auto is the checkpoint's own."),
        remote_code,
    ),
    panel(
        "Inputs",
        option("--batch-sizes", type=Listed(COUNT), metavar="N,N", help="Images and prompts at once."),
        option("--image-sizes", type=Listed(ImageSize()), metavar="HxW,HxW", help="Else the processor's own."),
        option("--prompt-tokens", type=Listed(COUNT), metavar="N,N", help="With the image; else a short question's."),
        option("--new-tokens", type=Listed(COUNT), metavar="N,N", help="Tokens of an answer, whatever it says."),
        option("--data", type=FILE_OR_FOLDER, help="Images and questions to use; else noise."),
        option("--seed", type=SEED, help="Of generated inputs."),
    ),
    panel(
        "How often",
        option("--decoder-tests/--no-decoder-tests", help="Also pp512 and tg128, as llama-bench names them."),
        option("--starts", type=COUNT, help="Of both processes per cell, at least; fewer than 3 decide nothing."),
        option("--rounds", type=COUNT, help="At most so many turns of each model per cell."),
        option("--cell-seconds", type=POSITIVE, help="No new start of a cell after so long."),
    ),
    panel(
        "Limits",
        option("--max-ttft-ms", type=POSITIVE, help="Exit with 4 if the slim model's first token takes longer."),
        option("--max-tpot-ms", type=POSITIVE, help="Exit with 4 if a later token takes longer."),
        option("--max-memory", type=Size(), metavar="SIZE", help="Exit with 4 if the slim model takes more."),
    ),
    panel(
        OUTPUTS,
        option("--out", type=PATH, help="Written anew after every cell."),
    ),
)

asked = defaulting_to(Asked)
cost_options = panel(
    "What it takes, with --cost",
    option("--cost", is_flag=True, help="Seconds, memory and disk of a compression, before it is begun."),
    option(
        "--device",
        type=Names(),
        default=(),
        metavar="NAMES",
        help="cpu, the machine at hand, which is measured, or " + ", ".join(MACHINES) + "; else all.",
    ),
    asked("--samples", type=COUNT, help="To calibrate on, in every round."),
    asked("--rounds", type=COUNT, help="Of calibration."),
    asked("--ratio", type=RATIO, help="Fraction of all parameters removed."),
    asked("--text-tokens", type=COUNT, help="Of a sample, besides its image."),
    asked("--image-side", type=COUNT, help="Of an image, in pixels; else the config's own, or 448."),
)
