"""What becomes of a cut model: graphs, answers, a report."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from slimvlm.compress.options import IN_TORCH
from slimvlm.console import show
from slimvlm.console.group import Interrupted, command
from slimvlm.console.options.delivering import export_options, private_option
from slimvlm.console.options.making import (
    COUNT,
    FOLDER,
    NAME,
    PATH,
    TEXT,
    again_options,
    json_option,
    option,
    output_options,
    remote_code,
    stream_option,
)
from slimvlm.console.printing import typed_lines
from slimvlm.console.progress import show_job


@command(first=("--format", "--dtype", "--variants", "--image-size", "--data", "--bundle", "--overwrite", "--verify"))
@click.argument("model", type=NAME)
@click.argument("out", type=PATH, required=False)
@export_options
@option("--verify", is_flag=True, help="Check the exported folder MODEL on this machine instead.")
@output_options
def export(model: str, out: Path | None, verify: bool, as_json: bool, quiet: bool, **values: Any) -> None:
    """Write MODEL as graphs that run without torch.

    ONNX in the layout transformers.js loads, TorchScript, torch.export; each is held against torch on real samples:

        slimvlm export out/model exported --format onnx --data test.jsonl
    """
    from slimvlm import export as exports

    if verify:
        show.show_verification(exports.verify(model), as_json=as_json)
        return
    if out is None:
        raise click.UsageError("Missing argument 'OUT'.")
    job = partial(exports.export_checkpoint, model, out, exports.ExportOptions(**values))
    show_job(job, partial(show.show_export, as_json=as_json), quiet)


@command()
@click.argument("model", type=NAME)
@click.argument("out", type=PATH)
@option("--as", "form", type=click.Choice(tuple(IN_TORCH)), default="int8", help="What its linears become.")
@remote_code
@stream_option
@json_option
def quantize(model: str, out: Path, form: str, as_json: bool, **loading: Any) -> None:
    """Write MODEL with weights in 8 or 4 bits, for torch.

    Through torchao; `from_pretrained` of transformers loads OUT again, and so does every command that runs a model. A
    name as MODEL:torch:int8 does the same without writing it:

        slimvlm quantize out/model out-int8 --as int8
    """
    from slimvlm.compress.models.saving import quantize_checkpoint

    show.show_quantized(quantize_checkpoint(model, out, form, **loading), as_json=as_json)


@command()
@click.argument("folder", type=NAME)
@click.argument("image", type=PATH)
@click.argument("question", type=TEXT, required=False)
@option("--against", type=NAME, metavar="MODEL", help="Show the answers of this checkpoint or export too.")
@option(
    "--backend",
    type=TEXT,
    metavar="NAME",
    help="As onnx:int8 of an export (else its first), or torch:int8.",
)
@option("--max-new-tokens", type=COUNT, default=64, help="Longest answer.")
@again_options
@option("--quiet", "-q", is_flag=True, help="No speed on stderr.")
def chat(
    folder: str, image: Path, question: str | None, against: str | None, max_new_tokens: int, quiet: bool, **values: Any
) -> None:
    """Ask FOLDER about an IMAGE.

    FOLDER is a checkpoint or an export, FOLDER[:BACKEND[:VARIANT]]. The answer is shown as it comes; without QUESTION a
    line of stdin is one, until one is empty, each asked on its own, and `/image PATH` changes the image:

        slimvlm chat out/model photo.jpg "What is in the image?"
    """
    from slimvlm.serve.chat import answer, converse, open_chat, open_image

    picture = open_image(image)
    backend = values.pop("backend")
    chats = [open_chat(folder, backend=backend, **values)]
    if against is not None:
        chats.append(open_chat(against, **values))
    tell = partial(click.echo, nl=False)
    note = (lambda line: None) if quiet else partial(click.echo, err=True)
    try:
        if question is None:
            converse(chats, picture, typed_lines(), max_new_tokens, tell, note)
        else:
            answer(chats, picture, question, max_new_tokens, tell, note)
    except KeyboardInterrupt:
        raise Interrupted("interrupted") from None


@command()
@click.argument("run", type=FOLDER)
@json_option
def report(run: Path, as_json: bool) -> None:
    """Write report.html and report.md of a RUN.

    RUN is what `slimvlm compress` wrote, which does this at its end; after a later recovery or export:

        slimvlm report out
    """
    from slimvlm.serve.report import write_report

    show.show_written(write_report(run), as_json=as_json)


@command()
@click.argument("folder", type=FOLDER)
@click.argument("repo", type=TEXT)
@private_option
@output_options
def push(folder: Path, repo: str, private: bool, as_json: bool, quiet: bool) -> None:
    """Upload FOLDER to the Hub as REPO.

    FOLDER is a checkpoint or an export that slimvlm wrote, REPO is OWNER/NAME; the token is that of HF_TOKEN or of
    `hf auth login`. An upload that was interrupted goes on with the same command:

        slimvlm push out/model me/my-vlm-slim --private
    """
    from slimvlm.export.push import push_folder

    job = partial(push_folder, folder, repo, private=private)
    show_job(job, partial(show.show_pushed, as_json=as_json), quiet)
