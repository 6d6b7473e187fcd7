"""Scenes and their questions."""

import random

import numpy as np
import pytest
from PIL import Image

from slimvlm.demo.concepts import CONCEPTS, POSITIONS, TASKS
from slimvlm.demo.make_data import Split, make
from slimvlm.demo.scenes import KINDS, SIDE, Scene, questions, render, scenes, vocabulary
from slimvlm.demo.sources import SPRITE


@pytest.fixture(scope="module")
def sprites():
    """One flat square per concept: its colour is its number."""
    return {
        "noto": {
            concept.word: [Image.new("RGBA", (SPRITE, SPRITE), (index, 255 - index, 99, 255))]
            for index, concept in enumerate(CONCEPTS)
        }
    }


def test_scene_stream_repeats_under_a_seed_and_changes_with_it(sprites):
    def first(seed):
        stream = scenes(seed, sprites, {"noto": 1.0}, "train")
        return [(scene, image.tobytes()) for scene, image in (next(stream) for _ in range(8))]

    assert first(3) == first(3)
    assert first(3) != first(4)


def test_streams_of_different_splits_never_share_a_composition(sprites):
    found = {}
    for split in ("train", "val", "test"):
        stream = scenes(0, sprites, {"noto": 1.0}, split)
        found[split] = {next(stream)[0].composition for _ in range(100)}
    assert not found["train"] & found["test"] and not found["train"] & found["val"] and not found["val"] & found["test"]


def test_objects_stay_inside_their_cells(sprites):
    scene = Scene("noto", (None, None, None, "fox"), ("white",) * 4)
    for seed in range(20):
        pixels = np.asarray(render(random.Random(seed), scene, sprites)).astype(int)
        half = SIDE // 2
        for tile in (pixels[:half, :half], pixels[:half, half:], pixels[half:, :half]):
            assert (tile == tile[0, 0]).all()
        assert (pixels[half:, half:] != pixels[-1, -1]).any()


def test_answers_follow_from_the_scene():
    scene = Scene("noto", ("fox", "apple", None, "violin"), ("red", "blue", "green", "white"))
    allowed = {
        "what is right of the fox ?": "apple",
        "what is left of the apple ?": "fox",
        "what is below the apple ?": "violin",
        "what is above the violin ?": "apple",
    }
    for seed in range(50):
        for question in questions(random.Random(seed), scene):
            words = question.text.split()
            if question.task == "rel":
                assert allowed[question.text] == question.answer
            elif question.task == "kindby":
                relation = question.text.replace("what kind of thing is", "what is")
                assert question.answer == KINDS[allowed[relation]]
            elif question.task == "where":
                assert scene.objects[POSITIONS.index(question.answer)] == words[-2]
            elif question.task == "behind":
                assert scene.colours[scene.objects.index(words[-2])] == question.answer
            elif question.task == "count":
                assert question.answer == "three"
            elif question.task == "describe":
                assert question.answer == "fox apple nothing violin"
            else:
                cell = POSITIONS.index(" ".join(words[-3:-1]))
                truth = {"at": scene.objects[cell], "colour": scene.colours[cell]}
                truth["kind"] = KINDS.get(scene.objects[cell])
                assert question.answer == truth[question.task]


def test_every_task_is_asked_of_a_full_scene_and_uses_known_words():
    words = set(vocabulary())
    asked = questions(random.Random(0), Scene("noto", ("fox", "apple", "bus", "violin"), ("red",) * 4))
    assert tuple(question.task for question in asked) == TASKS
    assert all(set(f"{question.text} {question.answer}".split()) <= words for question in asked)


def test_a_lone_object_has_no_neighbour_questions():
    asked = questions(random.Random(0), Scene("noto", ("fox", None, None, None), ("red",) * 4))
    assert not {"rel", "kindby"} & {question.task for question in asked}


def test_sample_set_is_the_same_for_the_same_seed(sprites, tmp_path):
    splits = (Split("train", 6, {"noto": 1.0}, "train", 9), Split("test", 4, {"noto": 1.0}, "test", 7))
    for name in ("one", "two"):
        make(sprites, tmp_path / name, 5, splits)
    one = {path.relative_to(tmp_path / "one"): path.read_bytes() for path in (tmp_path / "one").rglob("*.*")}
    two = {path.relative_to(tmp_path / "two"): path.read_bytes() for path in (tmp_path / "two").rglob("*.*")}
    assert one == two and len(one) == 12
