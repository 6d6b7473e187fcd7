"""`make clients` installs the programs of others and says where (SLIMVLM_CLIENTS); else these tests are skipped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from plans import random_plan

from slimvlm.compress.errors import CheckFailedError
from slimvlm.compress.models.checkpoint import load_model
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.demo import MODEL, SAMPLES
from slimvlm.export import ExportOptions, export_checkpoint
from slimvlm.export.variants import VARIANTS


def pytest_collection_modifyitems(items):
    if not os.environ.get("SLIMVLM_CLIENTS"):
        here = Path(__file__).parent
        for item in items:
            if here in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="make clients installs the programs of others"))


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The demo model, cut to another number of KV heads and channels in every layer, as an export in every variant."""
    folder = tmp_path_factory.mktemp("demo")
    loaded = load_model(MODEL)
    plan = random_plan(loaded.model, seed=3)
    save_checkpoint(folder / "model", apply_plan(loaded.model, plan), loaded.processor, plan)
    how = {"exporter": "torchscript", "variants": tuple(VARIANTS), "max_new_tokens": 8}
    try:
        return export_checkpoint(folder / "model", folder / "export", ExportOptions(data=SAMPLES / "val.jsonl", **how))
    except CheckFailedError as failed:  # cut at random and not recovered, it bears no fewer bits; it runs all the same
        return failed.result
