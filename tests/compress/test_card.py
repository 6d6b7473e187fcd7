"""The model card: what it carries over from the base model, what it tells, and what it never tells."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import ModelCard
from plans import random_plan
from tiny_models import FACTORIES, tiny_model

from slimvlm.compress.card import (
    BASE_CARD,
    CARD,
    Measured,
    Recovered,
    Scored,
    read_card,
    tell_quality,
    write_card,
    write_export_card,
)
from slimvlm.compress.files.folders import list_files
from slimvlm.compress.models.checkpoint import load_model
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.slicing.apply import apply_plan

THEIRS = "---\nlicense: mit\nlanguage: [en, de]\ndatasets: owner/pictures\ntags: [cats]\n---\n# My VLM\n\nKnows cats.\n"


def dense(folder, card=THEIRS):
    save_checkpoint(folder, tiny_model("llava").model, None, None)
    (folder / CARD).unlink()
    if card is not None:
        (folder / CARD).write_text(card)
    return folder


def cut(source, out, seed=1):
    loaded = load_model(source)
    plan = random_plan(loaded.model, seed=seed)
    save_checkpoint(out, apply_plan(loaded.model, plan), None, plan)
    return plan


def told_of(folder, card, config=None):
    """The card of what was made of a folder with this card and config."""
    for name in ("my-vlm", "made"):
        (folder / name).mkdir()
    if card is not None:
        (folder / "my-vlm" / CARD).write_text(card)
    (folder / "my-vlm" / "config.json").write_text(json.dumps(config or {}))
    write_card(folder / "made", folder / "my-vlm", None, contrastive=False, form=None)
    return ModelCard.load(folder / "made" / CARD)


def scored(task="all", slim=0.5, high=-0.1):
    return Scored(task, 40, 0.9, slim, slim - 0.95, high)


def measured(*tasks, **changes):
    told = {"data": "test.jsonl", "held_out": True, "images": 20, "metric": "right answers", "level": 0.95}
    return Measured(**{**told, "blind": 0.2, "whole": scored(), "tasks": tasks, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A dense model with a card of its authors, and a cut of it."""
    root = tmp_path_factory.mktemp("secret-place")
    plan = cut(dense(root / "my-vlm"), root / "slim")
    return root, plan


@pytest.mark.parametrize("name", FACTORIES)
def test_every_family_has_a_card_that_the_hub_reads(tmp_path, name):
    tiny = tiny_model(name)
    plan = random_plan(tiny.model, seed=1)
    save_checkpoint(tmp_path / "slim", apply_plan(tiny.model, plan), None, plan)
    card = ModelCard.load(tmp_path / "slim" / CARD)
    contrastive = find_family(tiny.model.config).contrastive
    task = "zero-shot-image-classification" if contrastive else "image-text-to-text"
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", task)
    assert card.data.tags == ["slimvlm", "pruning", "structured-pruning"]
    auto = "AutoModel" if contrastive else "AutoModelForImageTextToText"
    assert f'{auto}.from_pretrained("FOLDER", trust_remote_code=True)' in card.text
    assert f'pipeline("{task}"' in card.text


def test_licence_languages_and_data_sets_are_those_of_the_base_and_its_text_lies_beside(made):
    card = ModelCard.load(made[0] / "slim" / CARD)
    assert (card.data.license, card.data.language, card.data.datasets) == ("mit", ["en", "de"], "owner/pictures")
    assert (made[0] / "slim" / BASE_CARD).read_text() == THEIRS
    assert f"]({BASE_CARD})" in card.text and "`mit`, that of the base model" in card.text


def test_the_card_tells_method_ratio_and_parameters_before_and_after(made):
    root, plan = made
    card = ModelCard.load(root / "slim" / CARD)
    told = card.data.to_dict()["slimvlm"]
    assert (told["base"], told["cut"]["ratio"], told["cut"]["criterion"]) == ("my-vlm", plan.ratio, plan.criterion)
    assert told["cut"]["whole"] == {"before": plan.parameters_before, "after": plan.parameters_after}
    row = f"| all | {plan.parameters_before:,} | {plan.parameters_after:,} | {100 * plan.removed_fraction:.1f} % |"
    assert row in card.text and set(plan.towers) == set(told["cut"]["towers"])
    assert "Not measured." in card.text and "Cut without recovery" in card.text


def test_no_card_names_a_path_of_the_machine(made):
    assert str(made[0]) not in (made[0] / "slim" / CARD).read_text()
    assert "secret-place" not in (made[0] / "slim" / CARD).read_text()


def test_a_base_read_from_a_folder_is_no_name_on_the_hub(made):
    data = ModelCard.load(made[0] / "slim" / CARD).data
    assert data.base_model is None and "base_model_relation" not in data.to_dict()


@pytest.mark.parametrize(
    ("card", "config", "named"),
    [
        ("some-body/my.vlm-2b", "else/where", "some-body/my.vlm-2b"),
        (["some-body/my.vlm-2b"], None, "some-body/my.vlm-2b"),
        (None, "some-body/my.vlm-2b", "some-body/my.vlm-2b"),
        (["two/merged", "into/one"], None, None),
        (7, "/home/me/my-vlm", None),
        ("my-vlm", "../runs/my-vlm", None),
        (None, "out/checkpoint-500", None),
    ],
)
def test_a_folder_is_named_as_its_card_or_its_config_says(tmp_path, card, config, named):
    text = None if card is None else f"---\nbase_model: {json.dumps(card)}\n---\n"
    found = told_of(tmp_path, text, None if config is None else {"_name_or_path": config})
    assert found.data.base_model == named
    assert ("was read from a folder" in found.text) == (named is None)


def test_a_base_from_the_hub_is_named_as_there_through_every_further_step(tmp_path):
    snapshot = tmp_path / "models--some-body--my.vlm-2b" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    cut(dense(snapshot), tmp_path / "slim")
    assert ModelCard.load(tmp_path / "slim" / CARD).data.base_model == "some-body/my.vlm-2b"
    tell_quality(tmp_path / "slim", Recovered("lpd", "lora", 10, 20), measured(scored()))
    cut(tmp_path / "slim", tmp_path / "slimmer", seed=2)
    (tmp_path / "export").mkdir()
    tags = ("onnx", "quantization")
    write_export_card(tmp_path / "export", tmp_path / "slim", "## Graphs\n", contrastive=False, tags=tags)
    found = {name: ModelCard.load(tmp_path / name / CARD) for name in ("slim", "slimmer", "export")}
    assert {card.data.base_model for card in found.values()} == {"some-body/my.vlm-2b"}
    relations = {name: card.data.to_dict().get("base_model_relation") for name, card in found.items()}
    assert relations == {"slim": "finetune", "slimmer": None, "export": "quantized"}
    assert "had been cut before" in found["slimmer"].text and "Not measured" in found["slimmer"].text
    assert "test.jsonl" in found["export"].text and "before it was exported" in found["export"].text
    assert (tmp_path / "slimmer" / BASE_CARD).read_text() == THEIRS


def test_what_was_measured_is_told_with_its_interval_and_what_got_worse(tmp_path):
    cut(dense(tmp_path / "my-vlm"), tmp_path / "slim")
    worse, same = scored("colours", 0.3, -0.2), scored("shapes", 0.9, 0.05)
    tell_quality(tmp_path / "slim", Recovered("lpd", "lora", 321, 2000), measured(worse, same))
    text = ModelCard.load(tmp_path / "slim" / CARD).text
    assert "| mean of tasks | 40 | 90.0 % | 50.0 % | -40.0 (-45.0 to -10.0) |" in text
    assert "Measurably worse at colours (90.0 % to 30.0 %)." in text and "none of which was calibrated on" in text
    assert "recipe `lpd`, lora, 321 steps on 2000 samples" in text and "Cut without recovery" not in text
    assert json.loads((tmp_path / "slim" / "manifest.json").read_text())["files"] == list_files(tmp_path / "slim")
    again = read_card(tmp_path / "slim").told
    assert again.measured.tasks == (worse, same) and again.cut is not None


def test_the_same_cut_saved_again_is_not_told_as_a_second_one(made, tmp_path):
    loaded = load_model(made[0] / "slim")  # as a recovery, a quantisation and zeros do
    save_checkpoint(tmp_path / "again", loaded.model, None, made[1])
    one, other = (read_card(folder).told for folder in (made[0] / "slim", tmp_path / "again"))
    assert (other.earlier, other.cut) == (None, one.cut)
    assert "had been cut before" not in (tmp_path / "again" / CARD).read_text()


def test_a_card_that_somebody_wrote_in_the_place_of_ours_stays(tmp_path):
    cut(dense(tmp_path / "my-vlm"), tmp_path / "slim")
    (tmp_path / "slim" / CARD).write_text("# My own\n")
    tell_quality(tmp_path / "slim", None, measured(scored()))
    assert (tmp_path / "slim" / CARD).read_text() == "# My own\n"


@pytest.mark.parametrize(
    "card",
    (
        None,
        "",
        "---\n: [\n---\n",
        "---\n- a list\n---\n",
        "---\nlicense: [1, 2]\nlanguage: no\nslimvlm: ours\n---\n",
        "---\nlicense: {a: b}\n---\n",
        "---\nlicense: mit\nlong: " + "x" * 2**18 + "\n---\n",
        "---\n" + "[" * 900 + "\n---\n",
        "---\nslimvlm: {base: [x], cut: 3}\n---\n",
        "---\nmodel_name: 'a `b`\n  | <c> {{ told }}'\n---\n",
        "---\nlicense: !!python/object/apply:os.system [x]\n---\n",
    ),
)
def test_any_text_may_stand_in_the_place_of_a_base_models_card(tmp_path, card):
    told = told_of(tmp_path, card)
    assert told.data.license is None and told.data.language is None
    assert "names none in its card or config" in told.text
    assert told.text.split("\n")[1] in ("# my-vlm", "# a b  c  told") and "<c>" not in told.text


def test_the_config_says_the_licence_where_no_card_does(tmp_path):
    assert told_of(tmp_path, None, {"license": "apache-2.0"}).data.license == "apache-2.0"
