import importlib.util
import json
import os
import random
import shutil
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from slimvlm.compress.data import images
from slimvlm.compress.data.records import Turn
from slimvlm.compress.data.samples import Sample, batches, load_samples, open_image, split_caption
from slimvlm.compress.errors import MissingDependencyError, SampleError


def tiny_image(width: int = 24, height: int = 20, seed: int = 0) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(width * height * 3))


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def draw(folder: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        tiny_image(seed=seed).save(folder / name)


def jsonl(file: Path, *records: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def questions(folder: Path, count: int = 6) -> Path:
    draw(folder, *(f"images/{index % 3}.png" for index in range(count)))
    rows = [
        {"image": f"images/{index % 3}.png", "question": f"how many {index} ?", "answer": str(index), "task": "count"}
        for index in range(count)
    ]
    return jsonl(folder / "set.jsonl", *rows)


# ------------------------------------------------------------------ formats


def test_jsonl_gives_questions_captions_turns_tasks_and_vendors(tmp_path: Path) -> None:
    draw(tmp_path, "a.png")
    file = jsonl(
        tmp_path / "set.jsonl",
        {"image": "a.png", "question": "what ?", "answer": "fox", "task": "at", "vendor": "noto"},
        {"image": "a.png", "prompt": "<image>\nwhat ?", "caption": "a fox", "tag": "free"},
        {"image": "a.png", "caption": "a red fox"},
        {"image": "a.png", "turns": [{"question": "1 ?", "answer": "one"}, {"prompt": "2 ?", "answer": 2}]},
        {"image": "a.png", "question": "seen ?", "answers": ["cat", "fox", "fox"]},
        {"image": "a.png", "question": "seen ?", "answers": [{"answer": "yes"}, {"answer": "no"}], "answer": "fox"},
    )
    loaded = load_samples(file)
    assert [sample.turns for sample in loaded.samples] == [
        (Turn("what ?", ("fox",)),),
        (Turn("what ?", ("a fox",)),),
        (Turn("", ("a red fox",)),),
        (Turn("1 ?", ("one",)), Turn("2 ?", ("2",))),
        (Turn("seen ?", ("cat", "fox", "fox")),),
        (Turn("seen ?", ("fox", "yes", "no")),),
    ]
    assert [(sample.task, sample.vendor) for sample in loaded.samples[:3]] == [
        ("at", "noto"),
        ("free", None),
        (None, None),
    ]
    assert loaded.samples[4].turns[0].target == "fox"
    assert [sample.identity for sample in loaded.samples[:2]] == ["set.jsonl:1", "set.jsonl:2"]
    assert (loaded.source, loaded.bad) == ("set.jsonl", ())


def test_llava_conversation_json_gives_the_turns_without_the_placeholder(tmp_path: Path) -> None:
    draw(tmp_path, "images/GCC_1.jpg")  # as in CC595K: names without their folder
    conversation = [
        {"from": "human", "value": "Give a brief description of the image.\n<image>"},
        {"from": "gpt", "value": "a fox in the snow"},
        {"from": "human", "value": "What colour?"},
        {"from": "gpt", "value": "red"},
    ]
    record = {"id": "GCC_1", "image": "GCC_1.jpg", "conversations": conversation}
    (tmp_path / "chat.json").write_text(json.dumps([record]))
    (sample,) = load_samples(tmp_path / "chat.json").samples
    assert sample.turns == (
        Turn("Give a brief description of the image.", ("a fox in the snow",)),
        Turn("What colour?", ("red",)),
    )
    assert sample.identity == "chat.json[0]"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.jsonl", '{"file_name": "b/2.png", "text": "a cat"}\n{"file_name": "1.png", "text": "a fox"}\n'),
        ("metadata.csv", "file_name,text\nb/2.png,a cat\n1.png,a fox\n"),
        ("captions.json", '{"b/2.png": "a cat", "1.png": "a fox"}'),
        ("captions.txt", "b/2.png\ta cat\n1.png\ta fox\n"),
    ],
)
def test_an_image_folder_takes_captions_from_a_file_of_the_folder(tmp_path: Path, name: str, content: str) -> None:
    draw(tmp_path, "1.png", "b/2.png")
    (tmp_path / name).write_text(content)
    assert [sample.turns[0].target for sample in load_samples(tmp_path).samples] == ["a cat", "a fox"]


def test_an_image_folder_takes_captions_from_text_files_beside_the_images(tmp_path: Path) -> None:
    draw(tmp_path, "1.png", "b/2.JPG")
    (tmp_path / "1.txt").write_text("a fox\n")
    (tmp_path / "b/2.txt").write_text("a cat\n")
    loaded = load_samples(tmp_path)
    assert [(sample.identity, sample.turns[0].target) for sample in loaded.samples] == [
        ("1.png", "a fox"),
        ("b/2.JPG", "a cat"),
    ]


def test_a_hugging_face_dataset_needs_its_package_or_gives_the_same_samples(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    if importlib.util.find_spec("datasets") is None:
        folder.mkdir()
        (folder / "dataset_info.json").write_text("{}")
        with pytest.raises(MissingDependencyError, match="pip install 'slimvlm\\[data\\]'"):
            load_samples(folder)
        return
    import datasets
    import pyarrow

    pictures = [tiny_image(seed=seed) for seed in range(3)]
    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    rows = [
        {"image": {"bytes": png(picture), "path": None}, "question": "what ?", "answer": answer}
        for picture, answer in zip(pictures, ("fox", "cat", "dog"), strict=True)
    ]
    table = datasets.Dataset(
        pyarrow.Table.from_pylist(rows, schema=features.arrow_schema), fingerprint="0123456789abcdef"
    )
    table.save_to_disk(str(folder))
    loaded = load_samples(folder)
    assert [sample.turns[0].target for sample in loaded.samples] == ["fox", "cat", "dog"]
    assert open_image(loaded.samples[2]).tobytes() == pictures[2].tobytes()
    assert len({sample.image for sample in loaded.samples}) == 3


def test_a_dataset_of_several_splits_asks_for_one(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(SampleError, match="give the folder of one of them: train"):
        load_samples(tmp_path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"image": "a.png", "question": "what ?"}', "no answer; accepted is one of the keys answer"),
        ('{"image": "a.png"', "set.jsonl:2: is not valid JSON"),
        ('["a.png"]', "is ['a.png']; accepted is an object"),
        ('{"image": "a.png", "answers": "fox"}', "'answers' is 'fox'; accepted is a list"),
        ('{"image": "a.png", "answer": true}', "answer is True; accepted is a text"),
        ('{"image": "a.png", "conversations": [{"from": "gpt", "value": "x"}]}', "turn 0 comes from 'gpt'"),
        ('{"image": "a.png", "conversations": [{"from": "human", "value": "x"}]}', "an answer to every question"),
        ('{"image": "a.png", "turns": "what"}', "must be a list of objects"),
    ],
)
def test_a_record_of_a_wrong_form_is_an_error_that_names_its_line(tmp_path: Path, record: str, message: str) -> None:
    draw(tmp_path, "a.png")
    file = jsonl(tmp_path / "set.jsonl", {"image": "a.png", "answer": "fox"})
    file.write_text(file.read_text() + record + "\n")
    with pytest.raises(SampleError, match="set.jsonl:2") as caught:
        load_samples(file)
    assert message in str(caught.value)


def test_data_that_is_not_there_or_of_no_known_format_says_what_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "set.parquet").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    for name in ("missing.jsonl", "set.parquet", "empty"):
        with pytest.raises(SampleError, match="accepted is"):
            load_samples(tmp_path / name)
    (tmp_path / "set.jsonl").write_text("\n")
    with pytest.raises(SampleError, match="holds no samples"):
        load_samples(tmp_path / "set.jsonl")


def test_a_folder_of_several_sample_files_asks_for_one(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl"):
        jsonl(tmp_path / name, {})
    with pytest.raises(SampleError, match="give one of: test.jsonl, train.jsonl"):
        load_samples(tmp_path)


# ------------------------------------------------------------------ bad images


def bad_reason(tmp_path: Path, name: str) -> str:
    draw(tmp_path, "good.png")
    file = jsonl(tmp_path / "set.jsonl", {"image": name, "caption": "a fox"}, {"image": "good.png", "caption": "a fox"})
    loaded = load_samples(file, max_bad=0.5)
    assert len(loaded.samples) == 1
    (bad,) = loaded.bad
    assert bad.name == f"set.jsonl:1 ({name})"
    return bad.reason


def test_a_missing_image_is_reported(tmp_path: Path) -> None:
    assert bad_reason(tmp_path, "none.png") == "file not found"


def test_a_truncated_image_is_reported(tmp_path: Path) -> None:
    tiny_image(64, 64).save(tmp_path / "cut.jpg")
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    assert "truncated" in bad_reason(tmp_path, "cut.jpg")


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_a_file_that_is_no_image_is_reported(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text.png").write_bytes(content)
    assert "is not an image" in bad_reason(tmp_path, "text.png")


def test_a_huge_image_is_reported_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 500)
    Image.new("1", (30, 20)).save(tmp_path / "huge.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    file = jsonl(tmp_path / "set.jsonl", {"image": "huge.png", "caption": "x"}, {"image": "good.png", "caption": "x"})
    (bad,) = load_samples(file, max_bad=0.5).bad
    assert bad.reason == "is too large: 30 x 20 pixels, at most 500 in all"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../secret.png", "may not contain '..'"),
        ("images/../../secret.png", "may not contain '..'"),
        ("{outside}", "lies outside the data folder"),
        ("link.png", "lies outside the data folder"),
        ("linked/secret.png", "lies outside the data folder"),
        ("https://example.org/a.png", "is an address"),
        ("folder", "is not a regular file"),
        ("pipe", "is not a regular file"),
    ],
)
def test_an_image_outside_the_data_folder_is_never_opened(tmp_path: Path, name: str, reason: str) -> None:
    home = tmp_path / "data"
    draw(tmp_path, "secret.png")
    (home / "folder").mkdir(parents=True)
    (home / "link.png").symlink_to(tmp_path / "secret.png")
    (home / "linked").symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(home / "pipe")
    assert reason in bad_reason(home, name.format(outside=tmp_path / "secret.png"))


def test_links_and_absolute_names_inside_the_data_folder_are_followed(tmp_path: Path) -> None:
    draw(tmp_path, "a.png")
    (tmp_path / "b.png").symlink_to("a.png")
    file = jsonl(
        tmp_path / "set.jsonl",
        {"image": "b.png", "caption": "x"},
        {"image": str(tmp_path / "a.png"), "caption": "x"},
    )
    assert {sample.image for sample in load_samples(file).samples} == {(tmp_path / "a.png").resolve()}


@pytest.mark.parametrize("record", [{"caption": "x"}, {"image": ["a.png", "b.png"], "caption": "x"}])
def test_samples_without_exactly_one_image_are_reported(tmp_path: Path, record: dict) -> None:
    draw(tmp_path, "a.png")
    file = jsonl(tmp_path / "set.jsonl", record, {"image": "a.png", "caption": "x"}, {"image": "a.png", "caption": ""})
    bad = load_samples(file, max_bad=0.9).bad
    assert "image" in bad[0].reason
    assert bad[1].reason == "has an empty answer or caption"


def test_bad_samples_are_skipped_up_to_the_limit_and_refused_above_it(tmp_path: Path) -> None:
    file = questions(tmp_path, 6)
    (tmp_path / "images/1.png").write_bytes(b"broken")
    loaded = load_samples(file, max_bad=0.34)
    assert [bad.name for bad in loaded.bad] == ["set.jsonl:2 (images/1.png)", "set.jsonl:5 (images/1.png)"]
    assert len(loaded.samples) == 4
    with pytest.raises(SampleError, match=r"2 of 6 samples cannot be used.*set.jsonl:2.*is not an image.*--max-bad"):
        load_samples(file)


def test_a_set_of_bad_samples_only_is_refused_whatever_the_limit(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "set.jsonl", {"image": "none.png", "caption": "x"})
    with pytest.raises(SampleError, match="1 of 1 samples"):
        load_samples(file, max_bad=1.0)


# ------------------------------------------------------------------ digest, subset, split, batches


def test_the_digest_depends_on_texts_and_image_bytes_and_not_on_the_place(tmp_path: Path) -> None:
    file = questions(tmp_path / "here")
    digest = load_samples(file).digest
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    (tmp_path / "there/set.jsonl").rename(tmp_path / "there/other.jsonl")
    assert load_samples(tmp_path / "there/other.jsonl").digest == digest
    tiny_image(seed=99).save(tmp_path / "there/images/0.png")
    changed = load_samples(tmp_path / "there/other.jsonl").digest
    assert changed != digest
    file.write_text(file.read_text().replace("how many 3 ?", "how many 4 ?"))
    assert load_samples(file).digest not in (digest, changed)


def test_a_subset_follows_from_the_seed_and_keeps_the_file_order(tmp_path: Path) -> None:
    file = questions(tmp_path, 30)
    first, again, other = (load_samples(file, limit=10, seed=seed) for seed in (1, 1, 2))
    lines = [int(sample.identity.split(":")[1]) for sample in first.samples]
    assert lines == sorted(lines)
    assert len(lines) == 10
    assert first == again
    assert first.digest != other.digest
    assert len(load_samples(file, limit=100).samples) == 30


def test_only_images_that_are_used_are_read(tmp_path: Path) -> None:
    file = questions(tmp_path, 3)
    kept = load_samples(file, limit=1, seed=0).samples[0]
    for image in (tmp_path / "images").iterdir():
        if image.resolve() != kept.image:
            image.unlink()
    assert load_samples(file, limit=1, seed=0).samples == (kept,)


def test_captions_are_cut_in_their_first_half_and_single_words_are_kept_whole(tmp_path: Path) -> None:
    def sample(caption: str, index: int = 0) -> Sample:
        return Sample(tmp_path, (Turn("", (caption,)),), f"set:{index}")

    cuts = set()
    for index in range(60):
        (turn,) = split_caption(sample("one two three four five six seven", index), 5).turns
        assert f"{turn.prompt} {turn.target}" == "one two three four five six seven"
        cuts.add(len(turn.prompt.split()))
    assert cuts == {1, 2, 3}
    assert split_caption(sample("fox"), 5).turns == (Turn("", ("fox",)),)
    asked = Sample(tmp_path, (Turn("what ?", ("a fox",)),), "set:1")
    assert split_caption(asked, 5) == asked
    split = split_caption(sample("one two three four"), 5)
    assert split_caption(split, 6) == split


def test_load_samples_can_split_captions(tmp_path: Path) -> None:
    draw(tmp_path, "a.png")
    file = jsonl(tmp_path / "set.jsonl", {"image": "a.png", "caption": "a red fox in snow"})
    (turn,) = load_samples(file, split_prefix=True).samples[0].turns
    assert turn.prompt
    assert f"{turn.prompt} {turn.target}" == "a red fox in snow"


def test_batches_keep_the_order(tmp_path: Path) -> None:
    samples = list(load_samples(questions(tmp_path, 5)).samples)
    assert [len(batch) for batch in batches(samples, 2)] == [2, 2, 1]
    assert [sample for batch in batches(samples, 2) for sample in batch] == samples
    with pytest.raises(ValueError, match="batch size is 0"):
        batches(samples, 0)


@pytest.mark.parametrize("options", [{"limit": 0}, {"max_bad": -0.1}, {"max_bad": 1.1}])
def test_wrong_options_are_refused(tmp_path: Path, options: dict) -> None:
    with pytest.raises(ValueError, match="accepted is"):
        load_samples(questions(tmp_path), **options)


def test_images_are_opened_upright_and_as_rgb(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("L", (30, 10)).save(tmp_path / "a.jpg", exif=exif)
    file = jsonl(tmp_path / "set.jsonl", {"image": "a.jpg", "caption": "x"})
    image = open_image(load_samples(file).samples[0])
    assert (image.mode, image.size) == ("RGB", (10, 30))
