"""`slimvlm quantize`, and every command that runs a model on `MODEL:torch:FORM`, of the packaged demo model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from profiling import quick

from slimvlm.cli import main
from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.options import IN_TORCH, EvaluateOptions, FitOptions
from slimvlm.demo import MODEL, SAMPLES
from slimvlm.pipeline import evaluate_named
from slimvlm.serve.chat import open_chat, open_image
from slimvlm.serve.fitting.stage import backends_of
from slimvlm.serve.options import split_backend
from slimvlm.serve.profile import MEASURED
from slimvlm.serve.profiling import profile_models
from slimvlm.serve.targets import find_target, what_runs

PICTURE = SAMPLES / "images" / "test-000000.webp"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder and document of each form."""
    where, found = tmp_path_factory.mktemp("quantized"), {}
    for form in IN_TORCH:
        done = CliRunner().invoke(main, ["quantize", str(MODEL), str(where / form), "--as", form, "--json"])
        assert done.exit_code == 0, done.output
        found[form] = where / form, json.loads(done.stdout)
    return found


def test_a_folder_is_smaller_than_half_precision_and_says_what_became_of_the_linears(made):
    for form, (folder, document) in made.items():
        weights = (folder / "model.safetensors").stat().st_size
        assert (document["bytes"], document["linears"], document["out"]) == (weights, {form: 54}, str(folder))
        assert weights < 0.6 * document["bytes_before"]
    again = CliRunner().invoke(main, ["quantize", str(made["int8"][0]), str(made["int8"][0]) + "-again"])
    assert again.exit_code == 3 and "quantized" in again.stderr
    assert CliRunner().invoke(main, ["quantize", str(MODEL), "x", "--as", "int5"]).exit_code == 2


@pytest.mark.parametrize("form", IN_TORCH)
def test_evaluation_and_chat_of_a_form_and_of_its_folder_are_the_same(made, form):
    asked = EvaluateOptions(model=f"{MODEL}:torch:{form}", data=SAMPLES / "test.jsonl", eval_samples=8, device="cpu")
    found = evaluate_named(asked, str(made[form][0]))
    assert found.against is not None and found.against.rows == found.quality.rows
    image, said = open_image(PICTURE), []
    for name, backend in ((f"{MODEL}:torch:{form}", None), (str(MODEL), f"torch:{form}"), (str(made[form][0]), None)):
        said.append(open_chat(name, backend=backend, device="cpu").ask(image, "what is it", 4, lambda piece: None).text)
    assert len(set(said)) == 1


def test_a_profile_compares_any_form_with_any(made, tmp_path):
    options = quick(tmp_path, str(made["int4"][0]), against=f"{MODEL}:torch:int8", new_tokens=(2,))
    profile = profile_models(options)
    [cell] = profile.cells
    assert (cell.status, cell.backend, cell.dtype) == (MEASURED, "torch:int4", "int4")
    assert set(cell.ratios) == set(cell.runs["dense"].seconds) == set(cell.runs["slim"].seconds)
    assert cell.runs["slim"].bytes["tpot"] > 0
    assert profile.models["slim"].weight_bytes == made["int4"][1]["bytes"]
    assert profile.models["slim"].parameters == profile.models["dense"].parameters


def test_names_of_forms(made):
    folder = str(made["int8"][0])
    assert split_backend("torch:int4") == ("torch", "int4")
    assert what_runs(f"{MODEL}:torch:int4") == (str(MODEL), "torch:int4")
    assert (
        what_runs(folder) == what_runs(f"{folder}:torch") == what_runs(f"{folder}:torch:int8") == (folder, "torch:int8")
    )
    assert [find_target(name).backend for name in (folder, f"{folder}:torch", str(MODEL))] == ["torch:int8"] * 2 + [
        None
    ]
    assert find_target(f"{MODEL}:torch:int4").backend == "torch:int4"
    with pytest.raises(UnsuitableOptionError, match="torch:q4 is unknown; choose from .*, or torch:int8 or torch:int4"):
        what_runs(f"{MODEL}:torch:q4")


@pytest.mark.parametrize(
    ("changes", "words"),
    (
        ({"backend": ("torch:int4",), "dtype": "float32"}, "torch:int4 computes in bfloat16 only"),
        ({"backend": ("torch:fp16",)}, "--backend torch:fp16 is unknown"),
        ({"slim": f"{MODEL}:torch:int4", "dtype": "float16"}, "torch:int4 computes in bfloat16 only"),
    ),
)
def test_a_form_that_cannot_be_measured_is_refused_before_anything_is(tmp_path, changes, words):
    with pytest.raises(UnsuitableOptionError, match=words):
        profile_models(replace(quick(tmp_path, str(MODEL)), **changes))
    assert not (tmp_path / "profile.json").exists()


def test_quantized_weights_are_not_exported_cut_or_fitted(made, tmp_path):
    folder = str(made["int8"][0])
    for command in (["export", folder, str(tmp_path / "e")], ["inspect", folder]):
        done = CliRunner().invoke(main, command)
        assert (done.exit_code, "quantized" in done.stderr) == (3, True)
    with pytest.raises(UnsuitableOptionError, match="in torch only float weights are fitted"):
        backends_of(
            FitOptions(model=str(MODEL), data=Path("x"), backend="torch", variants=("int8",), target=("size=1MB",))
        )
