"""What of the real-parts model needs none of its packages: its questions, its training, and how the delta is merged."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_model
from tiny_processors import tiny_image, tiny_processor

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def parts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        from real_parts import joining, pictures, training
    return SimpleNamespace(joining=joining, pictures=pictures, training=training)


@pytest.fixture
def adapted(parts):
    model = tiny_model("llava_dinov2", "sdpa").model
    model.config.image_seq_length = 17
    parts.training.adapt(model)
    return model


def test_pictures_that_are_asked_about_are_of_no_vendor_and_no_photo_that_is_trained_on(parts):
    made = parts.pictures
    names = [{"name": f"thing {number}", "kind": "k", "group": "g"} for number in range(25)]
    vendors = (*made.TRAINED, made.UNSEEN)
    drawn = [made.Concept(said, {v: Path(f"{v}/{said['name']}") for v in vendors}) for said in names]
    stamps = [made.Photo({"sort": "s", "caption": f"photo {number}"}, Path(f"stamps/{number}")) for number in range(50)]
    rows, pictures = made.questions(drawn, stamps)
    files = {split: {pictures[row["image"]] for row in lines} for split, lines in rows.items()}
    assert sum(map(len, files.values())) - len(files["caption"]) == len(pictures) == len(set(pictures.values())) == 125
    assert files["caption"] < files["test"]
    assert not files["train"] & (files["val"] | files["test"])
    assert not files["val"] & files["test"]
    assert {file.parts[0] for file in files["train"]} == {*made.TRAINED, "stamps"}
    assert (
        {file.parts[0] for file in files["val"]} == {file.parts[0] for file in files["test"]} == {"twemoji", "stamps"}
    )
    concepts = [{row["answer"] for row in rows[split] if row["task"] == "name"} for split in ("val", "test")]
    assert not concepts[0] & concepts[1]


def test_a_concept_is_what_all_vendors_draw_whatever_they_call_the_file(parts, tmp_path):
    made = parts.pictures
    emoji = [
        {"label": "Red Fox", "hexcode": "1F98A", "group": 3, "subgroup": 1},
        {"label": "sun", "hexcode": "2600-FE0F", "group": 3, "subgroup": 1},
        {"label": "drawn by two", "hexcode": "1F000", "group": 3, "subgroup": 1},
        {"label": "owl", "hexcode": "1F989", "group": 3, "subgroup": 1},
        {"label": "one o'clock", "hexcode": "1F98A", "group": 3, "subgroup": 2},
    ]
    meta = {"groups": {"3": "animals-nature"}, "subgroups": {"1": "animal-mammal", "2": "time"}}
    for name, document in (("emojibase", emoji), ("groups", meta)):
        file = tmp_path / name / made.PACKAGES[name][1]
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(document))
    for vendor, code in (("fluent", "2600-fe0f"), ("noto", "2600"), ("twemoji", "2600")):
        folder = tmp_path / vendor / made.NPM[vendor][1]
        folder.mkdir(parents=True)
        for stem in ("1f98a", code, *(["1f989"] if vendor != "noto" else [])):
            (folder / f"{stem}.png").touch()
    found = list(made.concepts(tmp_path))
    assert [concept.answers["name"] for concept in found] == ["red fox", "sun"]
    assert found[0].answers == {"name": "red fox", "kind": "animal mammal", "group": "animals nature"}
    assert found[1].drawings["fluent"].stem == "2600-fe0f"


def test_a_transparent_picture_stands_whole_on_a_white_square(parts):
    picture = Image.new("RGBA", (300, 100), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (100, 0, 200, 100))
    made = parts.pictures.on_white(picture)
    assert (made.size, made.getpixel((64, 64)), made.getpixel((2, 64))) == ((128, 128), (255, 0, 0), (255, 255, 255))


def test_merging_the_delta_is_exact(parts, adapted):
    with torch.no_grad():  # whole numbers: no sum is rounded
        for weight in adapted.parameters():
            weight.copy_(torch.randint(-3, 4, weight.shape))
    dense = tiny_model("llava_dinov2").model
    unmerged = copy.deepcopy(adapted.model.language_model).unload()
    dense.model.language_model.load_state_dict(unmerged.state_dict())
    delta = parts.training.delta_of(adapted)
    parts.joining.merge(dense, delta)
    merged = adapted.model.language_model.merge_and_unload().state_dict()
    left = dense.model.language_model.state_dict()
    assert left.keys() == merged.keys()
    assert all(torch.equal(left[name], merged[name]) for name in left)
    assert not torch.equal(left["layers.0.mlp.up_proj.weight"], unmerged.layers[0].mlp.up_proj.weight)
    projector = adapted.model.multi_modal_projector.state_dict()
    assert all(torch.equal(w, projector[name]) for name, w in dense.model.multi_modal_projector.state_dict().items())


def test_questions_of_one_image_see_the_image_and_not_each_other(parts, adapted):
    tokenizer = tiny_processor("llava_dinov2").tokenizer
    asked = [[("what is it", "red fox"), ("how many", "two")], [("where", "left")]]
    token, label, place, mask = parts.training.pack(asked, tokenizer, adapted.config)
    image = (token[0] == adapted.config.image_token_index).nonzero().flatten()
    second = (place[0].diff() < 0).nonzero().flatten()[0] + 1  # its places begin behind the image again
    first = range(int(image[-1]) + 1, int(second))
    answered = (label[0, second:] >= 0).nonzero().flatten() + second
    assert len(image) == 17
    assert mask[0, 0][answered][:, image].all()
    assert not mask[0, 0][answered][:, first].any()
    assert place[0, first[0]] == place[0, second] == image[-1] + 1
    assert not mask[0, 0].triu(1).any()


def test_a_step_of_training_leaves_a_delta_that_goes_on(parts, adapted, tmp_path):
    rows = []
    for number, answer in enumerate(("red fox", "blue dog", "a cat")):
        tiny_image(seed=number).save(tmp_path / f"{number}.png")
        rows += [{"image": f"{number}.png", "question": "what is it", "answer": answer, "task": "name"}]
        rows += [{"image": f"{number}.png", "question": "describe", "answer": answer, "task": "caption"}]
    processor = tiny_processor("llava_dinov2")
    before = copy.deepcopy(adapted.model.language_model.state_dict())
    parts.training.align(adapted, processor, rows, tmp_path, 0.05)
    parts.training.train(adapted, processor, rows, tmp_path, tmp_path / "delta.safetensors", 1e-9)
    kept = load_file(tmp_path / "delta.safetensors")
    after = adapted.model.language_model.state_dict()
    changed = [name for name in after if not after[name].equal(before[name])]
    assert changed
    assert all("lora_" in name for name in changed)
    other = tiny_model("llava_dinov2").model
    parts.training.adapt(other)
    parts.training.resume(other, kept)
    assert all(torch.equal(kept[name], weight) for name, weight in parts.training.delta_of(other).items())
