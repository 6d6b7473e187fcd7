"""Checkpoints and exports go to the Hub whole, or are refused before anything is asked of it. A stand-in is asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner
from hub import TOKEN, running_hub, use
from huggingface_hub import ModelCard, constants
from plans import random_plan
from tiny_models import tiny_model

from slimvlm.cli import main
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.slicing.apply import apply_plan


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save(folder, **options):
    tiny = tiny_model("clip")
    plan = random_plan(tiny.model, seed=1)
    save_checkpoint(folder, apply_plan(tiny.model, plan), None, plan, **options)
    return folder


def push(*words):
    result = CliRunner().invoke(main, ["push", "--quiet", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refused(result, words):
    assert result.exit_code == 3 and words in result.stderr
    assert result.stderr.count("\n") == 1 and TOKEN not in result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("push") / "slim")


@pytest.fixture
def hub(monkeypatch):
    with running_hub() as hub:
        use(hub, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files go as LFS; Xet's store is not stood in
        yield hub


def test_an_upload_that_is_refused_in_the_middle_is_one_sentence_and_goes_on_with_the_same_command(hub, folder):
    before = contents(folder)
    hub.refused = {"/commit/": "Storage quota is exceeded"}
    sentence = refused(push(folder, "me/slim"), "did not get to me/slim as a whole")
    assert "Storage quota is exceeded" in sentence and "the same command goes on" in sentence
    assert contents(folder) == before and hub.repos == {"me/slim": {}} and len(hub.objects) == 1
    hub.refused = {}
    hub.asked.clear()
    assert push(folder, "me/slim").exit_code == 0
    assert hub.repos["me/slim"] == before == contents(folder)
    assert not [asked for asked in hub.asked if asked.startswith("PUT")]  # the weights were there already


def test_the_commands_own_process_finds_endpoint_and_token_in_its_environment(hub, folder, tmp_path):
    named = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-P", "-c", "from slimvlm.cli import main; main()", "push", str(folder), "me/other"]
    environment = {**os.environ, **named, "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["repo"], told["url"]) == ("me/other", f"{hub.address}/me/other")
    assert told["files"] == len(hub.repos["me/other"])


def test_a_repository_is_made_private_where_that_is_asked_for(hub, folder):
    push(folder, "me/seen")
    push(folder, "me/hidden", "--private")
    assert set(hub.repos) == {"me/seen", "me/hidden"} and hub.private == {"me/hidden"}


def test_only_files_of_the_manifest_go_and_weights_of_an_earlier_push_leave(hub, tmp_path):
    one = save(tmp_path / "one")
    (one / "notes.txt").write_text("mine")
    push(one, "me/slim")
    assert "notes.txt" not in hub.repos["me/slim"] and "model.safetensors" in hub.repos["me/slim"]
    hub.repos["me/slim"]["picture.png"] = b"theirs"
    shards = save(tmp_path / "shards", max_shard_size="60KB")
    push(shards, "me/slim")
    assert hub.repos["me/slim"] == {**contents(shards), "picture.png": b"theirs"}
    push(one, "me/slim")
    assert set(hub.repos["me/slim"]) == {*contents(one), "picture.png"} - {"notes.txt"}


def test_an_export_goes_with_its_card(hub, exported):
    export = exported("clip").out
    assert push(export, "me/graphs").exit_code == 0
    assert hub.repos["me/graphs"] == contents(export)
    card = ModelCard(hub.repos["me/graphs"]["README.md"].decode())
    assert card.data.library_name == "transformers.js"


def test_folders_with_small_files_alone_go_through_the_streamed_upload_too(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.large = ("nothing",)
    assert push(folder, "me/slim").exit_code == 0
    assert push(folder, "me/slim").exit_code == 0  # nothing is left to be done
    assert hub.repos["me/slim"] == contents(folder)


def test_what_cannot_be_pushed_is_refused_before_anything_is_asked_of_the_hub(hub, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(push(tmp_path / "empty", "me/slim"), "no checkpoint or export that slimvlm wrote")
    (tmp_path / "empty" / "run.json").write_text("{}")
    refused(push(tmp_path / "empty", "me/slim"), "give its folder model or export")
    broken = save(tmp_path / "broken")
    (broken / "config.json").unlink()
    refused(push(broken, "me/slim"), "config.json is missing; write it again")
    changed = save(tmp_path / "changed")
    (changed / "model.safetensors").write_bytes(b"x" * (changed / "model.safetensors").stat().st_size)
    refused(push(changed, "me/slim"), "model.safetensors was changed")
    for name in ("a/b/c", "-me/slim", "me/slim.git", "me/sl im"):
        refused(push("--", folder, name), "is no name of a repository; give OWNER/NAME")
    assert hub.asked == []


def test_without_a_token_or_offline_nothing_is_asked_of_the_hub(hub, folder, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(push(folder, "me/slim"), "HF_HUB_OFFLINE is set")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    refused(push(folder, "me/slim"), "there is no token to push to me/slim with; set HF_TOKEN")
    assert hub.asked == []


def test_a_token_that_the_hub_does_not_take_and_a_hub_that_is_not_there_are_one_sentence(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    refused(push(folder, "me/slim"), "me/slim was not made on the Hub")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(push(folder, "me/slim"), "me/slim was not made on the Hub")


def test_an_export_that_failed_its_checks_is_not_passed_on(hub, exported, tmp_path):
    copied = tmp_path / "export"
    copied.mkdir()
    for name, content in contents(exported("clip").out).items():
        (copied / name).parent.mkdir(exist_ok=True)
        (copied / name).write_bytes(content)
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps({**manifest, "ok": False, "failures": ["it differs"]}))
    refused(push(copied, "me/slim"), "failed its checks")
    assert hub.asked == []
