"""A model that is read block by block is scored as the whole one, by answers that are forced."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from streaming import pair
from tiny_folders import write_tiny
from tiny_models import EVERY

from slimvlm.cli import main
from slimvlm.compress.data.collate import collator_of
from slimvlm.compress.data.questions import pose
from slimvlm.compress.data.samples import load_samples
from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.evaluation.equality import relative_difference
from slimvlm.compress.evaluation.evaluate import evaluate
from slimvlm.compress.models import computing
from slimvlm.compress.models.checkpoint import load_model, stream_model
from slimvlm.compress.models.computing import bytes_to_compute
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.streaming.lazy import Lazy
from slimvlm.compress.models.streaming.scratch import Scratch
from slimvlm.compress.options import CompressOptions
from slimvlm.compress.streaming import pages
from slimvlm.compress.streaming.forwards import through_blocks
from slimvlm.demo import MODEL, SAMPLES
from slimvlm.pipeline import compress


def put_all_away(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """All that forwards hold goes into files wherever they wait; gives the bytes of each."""
    monkeypatch.setattr(pages, "KEPT", 0)
    monkeypatch.setattr(pages, "LEAST", 1)
    written, keep = [], Scratch.keep

    def counted(self: Scratch, values: torch.Tensor) -> Lazy:
        written.append(values.nbytes)
        return keep(self, values)

    monkeypatch.setattr(Scratch, "keep", counted)
    return written


def test_what_a_model_is_sure_of_is_its_forced_answer_whatever_the_questions_lengths_are() -> None:
    loaded = stream_model(MODEL)
    samples = load_samples(SAMPLES / "val.jsonl", limit=48, seed=0).samples
    rows = evaluate(loaded.model, collator_of(loaded), samples, batch_size=16).rows
    sure = [row for row in rows if row.loss < 0.1]  # every token of the right answer is nine times as likely as others
    assert len(sure) >= 36 and all(row.exact == 1 for row in sure)


@pytest.mark.parametrize("name", ["llava", "blip2_t5", "clip"])
def test_losses_are_those_of_the_whole_model(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = put_all_away(monkeypatch)
    model, data = write_tiny(tmp_path, name, samples=6)
    found = []
    for load in (load_model, stream_model):
        loaded = load(model, attention="eager")
        found.append(evaluate(loaded.model, collator_of(loaded), load_samples(data).samples, batch_size=4))
    assert written
    whole, streamed = found
    assert (whole.forced, streamed.forced) == (False, name != "clip")
    assert streamed.kind == whole.kind
    for one, other in zip(whole.rows, streamed.rows, strict=True):
        if name == "clip":
            assert (one.image_to_text, one.text_to_image) == (other.image_to_text, other.text_to_image)
        else:
            assert other.loss == pytest.approx(one.loss, rel=1e-4)
            assert (other.tokens, other.identity) == (one.tokens, one.identity)


@pytest.mark.parametrize("name", EVERY)
def test_what_a_model_computes_of_batches_that_go_through_it_together_is_what_it_computes_of_each(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_all_away(monkeypatch)
    whole, streamed = pair(tmp_path, name)
    family: Any = find_family(whole.model.config)
    batches = [whole.inputs(2), whole.inputs(1)]

    def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        output = model(**pose(model, family, batch).inputs)
        found: torch.Tensor = output.logits_per_image if family.contrastive else output.logits
        return found[:, :1]  # the first token is nowhere padding

    found = through_blocks(streamed.model, family, [partial(logits, streamed.model, batch) for batch in batches])
    with torch.no_grad():
        for batch, output in zip(batches, found, strict=True):
            assert relative_difference(logits(whole.model, batch), output) <= 1e-5


def test_the_command_says_that_answers_are_forced_and_compares_like_with_like(tmp_path: Path) -> None:
    model, data = write_tiny(tmp_path, samples=6)
    words = ["evaluate", str(model), "--data", str(data), "--stream", "on", "--quiet"]
    said = CliRunner().invoke(main, words)
    assert said.exit_code == 0 and "given the right ones before it" in said.stdout
    said = CliRunner().invoke(main, [*words, "--against", f"{model}:torch:int8"])
    assert said.exit_code == 3 and "are forced" in said.stderr and said.stderr.count("\n") == 1


def test_a_run_that_needs_no_whole_model_goes_from_end_to_end_where_the_weights_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = write_tiny(tmp_path)
    options = CompressOptions(
        model=str(model), data=data, out=tmp_path / "out", samples=4, eval_samples=4, rounds=1, ratio=0.2, steps=2,
        recover="blockwise", validation_samples=4, rank=4, export=(), profile=False, stream="on",
    )  # fmt: skip
    (tmp_path / "memory.stat").write_text("anon 0\n")
    (tmp_path / "memory.max").write_text(str(bytes_to_compute(options, str(model), 0) - 1))
    monkeypatch.setattr(computing, "CONTAINER", str(tmp_path))
    with pytest.raises(UnsuitableOptionError, match=r"needs all of .*my-vlm in memory"):
        compress(replace(options, profile=True))
    assert compress(options).comparison is not None
    found = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert found["dense"]["forced"] and found["slim"]["forced"]
    assert "given the right ones before it" in (tmp_path / "out" / "report.html").read_text()
