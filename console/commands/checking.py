"""What a model or a device allows."""

from __future__ import annotations

import os
from typing import Any  # the values of options, each of its own type

import click

from slimvlm.compress.errors import CheckFailedError
from slimvlm.console import show, show_inspection, show_selfcheck
from slimvlm.console.group import command
from slimvlm.console.options.cutting import attention_option
from slimvlm.console.options.making import NAME, device_option, json_option, option, output_options, remote_code
from slimvlm.console.options.measuring import cost_options
from slimvlm.console.progress import progress


@command()
@click.argument("model", type=NAME)
@attention_option
@option("--discover", is_flag=True, help="Find by experiment what no row says, and print the rows to add.")
@cost_options
@remote_code
@json_option
def inspect(
    model: str, attention_unit: str, discover: bool, trust_remote_code: bool, as_json: bool, **cost: Any
) -> None:
    """Show what can be removed from MODEL.

    Reads its config, no weights; also of what a compression will take, here or on another machine:

        slimvlm inspect ./my-vlm

        slimvlm inspect ./my-vlm --cost --device cuda:rtx-4090
    """
    from slimvlm.compress.models.inspection import discover_model, inspect_model

    if cost.pop("cost"):
        from slimvlm.serve.costing.asked import Asked
        from slimvlm.serve.costing.job import costs_of

        machines, side = cost.pop("device"), cost.pop("image_side")
        show_inspection.show_costs(costs_of(model, Asked(**cost), machines, side, trust_remote_code), as_json=as_json)
        return
    if not discover:
        show_inspection.show_inspection(inspect_model(model, attention_unit, trust_remote_code), as_json=as_json)
        return
    found = discover_model(model, attention_unit, trust_remote_code)
    show_inspection.show_discovered(found, as_json=as_json)
    found.discovery.trusted()


@command()
@device_option
@output_options
def kernels(device: str, as_json: bool, quiet: bool) -> None:
    """Check and time the kernels on this device.

    Against plain torch, on matrices of real models; nothing is timed if a result is wrong:

        slimvlm kernels --device cuda
    """
    from slimvlm.compress.processes import pick_device
    from slimvlm.kernels.bench import BenchOptions, describe, run

    with progress(quiet) as tell:
        found = run(BenchOptions(device=str(pick_device(device))), tell)
    show.show_kernels(found, describe(found), as_json=as_json)
    if found.failures:
        raise CheckFailedError(f"{len(found.failures)} of {len(found.checks)} checks failed; nothing was timed")


@command()
@device_option
@json_option
def selfcheck(device: str, as_json: bool) -> None:
    """Try everything on this device, once.

    Kernels, calibration, cut, recovery, export, profile and counters, on the packaged model; the last line is for a bug
    report. The first thing to run on a new machine:

        slimvlm selfcheck --device cuda:0
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as for the demo: it is the same small model
    from slimvlm.selfcheck.run import selfcheck as run_all

    report = run_all(device, None if as_json else show_selfcheck.show_outcome)
    show_selfcheck.show_selfcheck(report, as_json=as_json)
    if failed := report.named("FAIL"):
        raise CheckFailedError(f"{len(failed)} of {len(report.outcomes)} checks failed: {', '.join(failed)}")
