"""Every way to write a graph, for every family: it is written, it loads, and it is the model within its tolerance."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from exports import export_tiny, shallow_model
from tiny_models import FACTORIES

from slimvlm.export.client import run_onnx
from slimvlm.export.variants import FULL, QUANTIZED, TRACED, VARIANTS, Variant

DUAL = ("clip", "siglip")
TORCH_LIKE = 1e-5  # relative error of what is only written differently


def way_of(variant: Variant) -> tuple[dict, list[str]]:
    """Options that write a variant in every format that has it, and the formats and variants that they give."""
    formats, base = ("onnx", "torchscript"), TRACED[variant.dtype]
    written = [f"onnx {base}", *([f"onnx {variant.name}"] if variant.writer else []), f"torchscript {base}"]
    return {"dtype": base, "quantize": variant.name if variant.writer else None, "formats": formats}, written


# What a graph holds is tested in test_families and test_formats; what quantized graphs are made of comes with them.
WAYS = {name: way_of(variant) for name, variant in VARIANTS.items() if name != FULL}
WAYS["fused"] = {"quantize": QUANTIZED[0], "fuse": "cpu"}, [f"onnx {FULL}", f"onnx {QUANTIZED[0]}"]
WAYS["pt2"] = {"formats": ("pt2",)}, [f"pt2 {FULL}"]


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("way", WAYS)
def test_every_variant_of_every_family_is_the_model_within_its_tolerance(tmp_path, name, way):
    """On one and on several images, and in whole answers: `export_tiny` raises where a check of the export fails."""
    options, written = WAYS[way]
    manifest = export_tiny(name, tmp_path / "export", shallow_model, samples=3, max_new_tokens=3, **options).manifest
    assert sorted({f"{artifact.format} {artifact.variant}" for artifact in manifest.artifacts}) == written
    for artifact in manifest.artifacts:
        worst = max(difference["max_relative"] for difference in artifact.parity)
        variant = VARIANTS[artifact.variant]
        assert worst <= (TORCH_LIKE if artifact.variant == FULL else variant.tolerance.relative)
        assert Path(artifact.file).name.startswith(f"{artifact.graph}{variant.suffix}.")
        assert len(artifact.parity) >= 2
    assert len(manifest.checks) == (0 if name in DUAL else len(written))


def test_the_example_of_an_export_takes_every_variant():
    """It stands alone, so it says their names again."""
    assert f"choices=({', '.join(map(json.dumps, VARIANTS))})" in Path(run_onnx.__file__).read_text()
