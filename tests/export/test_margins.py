"""Exports are held to the tokens of torch, so those of the tiny models must not be near ties."""

import pytest
from exports import SIZES, cut_model
from outputs import sure_tokens
from tiny_models import FACTORIES

from slimvlm.compress.evaluation.evaluate import greedy
from slimvlm.export.checks.reference import export_samples
from slimvlm.export.options import ExportOptions


@pytest.mark.parametrize("name", sorted(set(FACTORIES) - {"clip", "siglip"}))
def test_the_answers_of_the_tiny_models_are_no_near_ties(name: str) -> None:
    model, collator = cut_model(name)
    options = ExportOptions(samples=5, image_size=SIZES.get(collator.family.export.vision)).checked()
    for sample in export_samples(collator, model, options):
        sure_tokens(model, collator.prompts([sample]), generation_config=greedy(model, collator, 6))
