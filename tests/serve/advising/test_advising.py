"""Advice: the published rules, with figures beside them, for every family that has a language model."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_models import FACTORIES, tiny_model

from slimvlm.cli import main
from slimvlm.compress.errors import UnsupportedModelError
from slimvlm.compress.options import CutOptions
from slimvlm.compress.recovery.checks import recipe_of
from slimvlm.compress.stages.plan import planning_of
from slimvlm.serve.advising.advising import advise_model
from slimvlm.serve.advising.figures import Figure, beside, figures
from slimvlm.serve.advising.rules import DEPTH, WIDTH, Asked, advise

DUAL = {"clip", "siglip"}


def config_of(name: str, folder: Path) -> str:
    tiny_model(name).model.config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("share", "samples", "want", "method", "train", "recipe", "rules"),
    [
        (0.1, 0, "quality", WIDTH, None, "none", ["R1", "R10"]),
        (0.15, 50_000, "quality", DEPTH, "projector", "sft", ["R2", "R6", "R10"]),
        (0.3, 50_000, "quality", DEPTH, "lora+projector", "sft+hidden", ["R3", "R6", "R10"]),
        (0.45, 50_000, "quality", WIDTH, "lora+projector", "sft+hidden", ["R4", "R6", "R7", "R10"]),
        (0.45, 50_000, "latency", DEPTH, "lora+projector", "sft+hidden", ["R3", "R6", "R7", "R8", "R10"]),
        (0.6, 50_000, "memory", WIDTH, "lora+projector", "sft+hidden", ["R4", "R6", "R7", "R9", "R10"]),
        (0.61, 50_000, "quality", None, None, "none", ["R5"]),
    ],
)
def test_the_rules_of_the_study_are_followed(share, samples, want, method, train, recipe, rules):
    found = advise(Asked(share, samples, want))
    assert (found.method, found.train, found.recipe) == (method, train, recipe)
    assert [reason.rule for reason in found.reasons] == rules


def test_below_half_a_twentieth_of_the_data_is_enough_and_from_half_on_all_of_it():
    assert [advise(Asked(share, 100_000)).data_fraction for share in (0.1, 0.49, 0.5, 0.6)] == [0.05, 0.05, 1, 1]


def test_an_advice_says_what_the_study_kept_and_what_it_does_not_know():
    found = advise(Asked(0.3, 50_000))
    assert "94.4 to 96.4 % was kept at 30 % of the language model" in found.reasons[0].text
    assert "88 to 93.7 % was kept" in found.reasons[0].text
    assert any("no seeds and no error bars" in text for text in found.cautions)
    assert any("fewer than the least" in text for text in advise(Asked(0.3, 100)).cautions)
    assert any("nothing; measure" in text for text in advise(Asked(0.4, 50_000)).cautions)
    assert "was not measured" in advise(Asked(0.45, 50_000, "latency")).reasons[0].text


@pytest.mark.parametrize("name", sorted(set(FACTORIES) - DUAL))
@pytest.mark.parametrize(("ratio", "samples"), [(0.05, 50_000), (0.2, 0)])
def test_an_advice_for_any_family_is_a_command_that_is_taken(name, ratio, samples, tmp_path):
    found = advise_model(config_of(name, tmp_path), ratio, samples, "quality")
    assert ratio < found.asked.share < 1
    if found.command is None:
        assert found.advice.method is None or found.notes
        return
    (tmp_path / "SAMPLES").touch()
    words = [str(tmp_path / "SAMPLES") if word == "SAMPLES" else word for word in shlex.split(found.command)[2:]]
    values = main.commands["compress"].make_context("compress", words).params
    options = CutOptions(**{field.name: values[field.name] for field in fields(CutOptions)})
    planning_of(options)
    if options.recover != "none":
        recipe_of(options)


@pytest.mark.parametrize("name", sorted(DUAL))
def test_a_model_without_a_language_model_is_refused(name, tmp_path):
    with pytest.raises(UnsupportedModelError, match="has no language model, and the rules are about those"):
        advise_model(config_of(name, tmp_path), 0.2, 0, "quality")


def test_our_figures_are_those_of_the_nearest_ratio_our_default_first():
    facts = {"recovered": False, "score": 0.5, "low": 0.4, "high": 0.6, "sets": 3, "source": "file"}

    def one(method: str, ratio: float, kept: float, bed: str = "demo") -> Figure:
        return Figure(bed=bed, method=method, ratio=ratio, kept=kept, **facts)

    known = [
        one(name, 0.5, kept) for name, kept in (("a", 0.9), ("slimvlm default", 0.1), ("b", 0.2), ("c", 0.3), ("d", 0))
    ]
    known += [one("a", 0.2, 0.99), one("z", 0.35, 0.5, "real")]
    assert [figure.method for figure in beside(0.45, False, known)] == ["slimvlm default", "a", "c", "b", "z"]
    assert beside(0.45, True, known) == []


def test_the_packaged_figures_say_where_they_are_from():
    assert len(figures()) > 50 and {one.recovered for one in figures()} == {True, False}
    assert all(".jsonl, " in one.source and one.low <= one.score <= one.high for one in figures())
    assert {one.method for one in beside(0.35, False)} > {"slimvlm default"}


def test_the_command_shows_the_rules_the_figures_and_what_to_do(tmp_path):
    words = ["advise", config_of("llava", tmp_path), "--ratio", "0.05", "--samples", "100"]
    shown = CliRunner().invoke(main, words).stdout.splitlines()
    assert [line.split()[0] for line in shown][:4] == ["model", "asked", "advice", "R2"]
    assert shown[-1].startswith("do       slimvlm compress") and any(line.startswith("here") for line in shown)
    document = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    assert document["advice"]["method"] == DEPTH and document["figures"]
