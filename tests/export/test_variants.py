"""Every way to write a graph, for every family: it is written, it loads, and it is the model within its tolerance."""

from __future__ import annotations

import math
from pathlib import Path

import onnx
import pytest
import torch
from exports import export_tiny, quality_of, shallow_model, size_of, tiny_samples
from tiny_models import FACTORIES

from slimvlm.export.variants import FULL, VARIANTS

DUAL = ("clip", "siglip")
TORCH_LIKE = 1e-5  # relative error of what is only written differently
# What a graph holds is tested in test_families and test_formats; what quantized graphs are made of comes with them;
# the exporters that take seconds are tested in test_dynamo.
WAYS = {
    "whole": {"variants": tuple(VARIANTS), "formats": ("onnx", "torchscript")},
    "fused": {"variants": (FULL, "int8", "q4"), "fuse": "cpu"},
}


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("way", WAYS)
def test_every_variant_of_every_family_is_the_model_within_its_tolerance(tmp_path, name, way):
    """On one and on several images, and in whole answers: `export_tiny` raises where a check of the export fails."""
    options = {"formats": ("onnx",), **WAYS[way]}
    out = tmp_path / "export"
    manifest = export_tiny(name, out, shallow_model, samples=3, max_new_tokens=3, **options).manifest
    written = {(artifact.format, artifact.variant) for artifact in manifest.artifacts}
    assert written == {
        (form, variant)
        for form in options["formats"]
        for variant in options["variants"]
        if form == "onnx" or VARIANTS[variant].writer is None
    }
    for artifact in manifest.artifacts:
        worst = max(difference["max_relative"] for difference in artifact.parity)
        variant = VARIANTS[artifact.variant]
        assert worst <= (TORCH_LIKE if artifact.variant == FULL else variant.tolerance.relative)
        assert Path(artifact.file).name.startswith(f"{artifact.graph}{variant.suffix}.")
        assert len(artifact.parity) >= 2
    assert len(manifest.checks) == (0 if name in DUAL else len(written))
    if way == "whole" and is_tied(name):
        assert [variant for variant in VARIANTS if not reads_the_table(out / "onnx", variant)] == ["int8"]
    samples = tiny_samples(2, size_of(name))
    scored = manifest.graphs if name == "llava" else {"onnx:fp16", "onnx:int8"} if way == "whole" else ()
    for backend in scored:
        quality = quality_of(out, name, backend, samples)
        assert len(quality.rows) == 2 and all(map(math.isfinite, quality.scores.values()))


def is_tied(name):
    """Whether the head is the table of embeddings."""
    model = shallow_model(name)[0]
    head = None if name in DUAL else model.get_output_embeddings()
    return head is not None and torch.equal(head.weight, model.get_input_embeddings().weight)


def reads_the_table(folder, variant):
    """Whether a decoder's head is in the file of the table, in whatever precision; int8 rounds the two differently."""
    suffix = VARIANTS[variant].suffix
    weights = onnx.load(folder / f"decoder_model_merged{suffix}.onnx", load_external_data=False).graph.initializer
    files = {entry.value for weight in weights for entry in weight.external_data if entry.key == "location"}
    return f"embed_tokens{suffix}.onnx_data" in files
