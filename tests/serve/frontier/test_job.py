"""A frontier, made: every cut in every precision, and what becomes of it when it is killed."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace

import pytest
from click.testing import CliRunner
from forked import Forked
from tiny_folders import write_tiny

from slimvlm.cli import main
from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.files.decoding import read
from slimvlm.compress.options import CutOptions
from slimvlm.compress.plan import Plan
from slimvlm.compress.runs import FRONTIER
from slimvlm.export.running.exported import Exported
from slimvlm.serve.frontier.choosing import recommend
from slimvlm.serve.frontier.frontier import Frontier
from slimvlm.serve.frontier.job import measure_frontier
from slimvlm.serve.frontier.options import FrontierOptions
from slimvlm.serve.report.sections.frontier import frontier_said

WORDS = (
    "--ratios 0.1,0.2 --variants int8 --recover none --eval-samples 6 --exporter torchscript --threads 1 --device cpu"
)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frontier")
    model, data = write_tiny(folder, samples=12)
    chosen = CutOptions(model=str(model), data=data, out=folder / "out", device="cpu", eval_samples=6, recover="none")
    return FrontierOptions(cut=chosen, ratios=(0.1, 0.2), variants=("int8",), exporter="torchscript", threads=1)


@pytest.fixture(scope="module")
def killed(asked):
    """Begun without times by a process that was sent SIGKILL once a cut was measured; what was on disk then."""
    words = ["slimvlm", "frontier", asked.cut.model, asked.out, "--data", asked.cut.data, *WORDS.split(), "--no-times"]
    with Forked(asked.out.parent, *words) as process:
        while not ((asked.out / FRONTIER).is_file() and '"ratio": 0.2' in (asked.out / FRONTIER).read_text()):
            assert process.runs(), process.stderr.read_text()
        assert process.kill() == -signal.SIGKILL
    return read(asked.out / FRONTIER, Frontier)


@pytest.fixture(scope="module")
def whole(asked, killed):
    """The same, continued, with times."""
    answers = {path: path.read_bytes() for path in asked.out.glob("cuts/*/quality-*.json")}
    found = measure_frontier(replace(asked, cut=replace(asked.cut, resume=True)))
    assert answers == {path: path.read_bytes() for path in answers}  # each holds the seconds it took
    return found


def test_a_killed_frontier_keeps_its_points_and_goes_on_with_the_others(killed, whole):
    order = [(0, "fp32"), (0, "int8"), (0.2, "int8"), (0.1, "int8")]
    assert [(point.ratio, point.variant) for point in killed.points] == order[: len(killed.points)]
    assert [(point.ratio, point.variant) for point in whole.points] == order
    for before, after in zip(killed.points, whole.points, strict=False):
        assert replace(after, cell=None, seconds=0) == replace(before, seconds=0)
    assert not whole.skipped and not whole.left


def test_what_was_not_timed_is_timed_when_it_goes_on(killed, whole):
    assert all(point.cell is None for point in killed.points) and all(point.cell is not None for point in whole.points)
    assert "Fastest" not in " ".join(choice.sentence for choice in recommend(killed))
    said = " ".join(str(one) for one in frontier_said(killed))
    assert "timed on" not in said and "asked the same 12 questions" in said


def test_every_cut_is_the_beginning_of_one_plan(asked, whole):
    plans = {ratio: read(asked.out / f"cuts/{ratio:g}/plan.json", Plan) for ratio in (0.1, 0.2)}
    assert plans[0.2].keep == read(asked.out / "plan.json", Plan).keep
    for key, kept in plans[0.2].keep.items():
        assert set(kept) <= set(plans[0.1].keep[key])
    removed = {point.ratio: point.removed for point in whole.points}
    assert removed == {0: 0, **{ratio: plan.removed_fraction for ratio, plan in plans.items()}}


def test_a_point_is_as_large_as_its_files_and_is_timed_beside_the_dense_model(asked, whole):
    full, *others = whole.points
    for point in whole.points:
        export = Exported.open(asked.out / point.folder)
        graphs = export.graphs[export.named(f"onnx:{point.variant}")]
        assert point.bytes == sum((asked.out / point.folder / one.file).stat().st_size for one in graphs)
        assert point.quality.questions == 12
    assert set(full.cell.runs) == {"slim"}
    assert all(set(point.cell.runs) == {"dense", "slim"} and point.cell.ratios for point in others)


def test_a_finished_frontier_is_shown_again_without_measuring(asked, whole):
    arguments = ["frontier", asked.cut.model, str(asked.out), "--data", str(asked.cut.data)]
    shutil.copytree(asked.out, copy := asked.out.with_name("copy"))
    arguments[2] = str(copy)
    found = CliRunner().invoke(main, [*arguments, *WORDS.split(), "--resume", "--target", "size=1GB", "--json"])
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    assert len(document["points"]) == len(whole.points)
    assert document["choices"][-1].startswith("Best under size 1 GB: ")
    assert "Best under size 1 GB" in (copy / "report.html").read_text()
    page = (copy / "report.html").read_bytes()
    (copy / "report.html").unlink()
    assert CliRunner().invoke(main, ["report", str(copy)]).exit_code == 0
    assert (copy / "report.html").read_bytes() == page


def test_a_budget_leaves_out_the_cuts_that_would_end_later(asked, whole, tmp_path):
    shutil.copytree(asked.out, copy := tmp_path / "copy")
    (copy / FRONTIER).write_text(replace(whole, points=whole.points[1:2]).to_json())
    chosen = replace(asked.cut, out=copy, resume=True)
    found = measure_frontier(replace(asked, cut=chosen, minutes=1e-6, times=False))
    assert [point.ratio for point in found.points] == [0, 0, 0.2] and found.left == ("10 % removed, int8",)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ratios": (0.0,)}, "at least one ratio above 0"),
        ({"ratios": (1.5,)}, "below 1"),
        ({"variants": ("int5",)}, "int5 is unknown"),
        ({"variants": ()}, "at least one"),
        ({"minutes": -1.0}, "above 0"),
        ({"target": ("weight=3kg",)}, "weight=3kg"),
    ],
)
def test_what_no_frontier_can_be_made_of_is_refused_in_a_sentence(asked, changes, said):
    with pytest.raises(UnsuitableOptionError, match=said):
        measure_frontier(replace(asked, **changes))


@pytest.mark.parametrize("name", ("llava_next", "blip2_t5", "clip"))
def test_a_frontier_is_made_of_families_of_every_kind(tmp_path, name):
    """One grid for all images, an encoder and a decoder, two towers; each of the others exports and answers alike."""
    model, data = write_tiny(tmp_path, name, samples=8)
    sizes = {"eval_samples": 2, "samples": 2, "rounds": 1, "criterion": "magnitude", "compensation": "none"}
    cut = CutOptions(model=str(model), data=data, out=tmp_path / "out", device="cpu", recover="none", **sizes)
    chosen = FrontierOptions(cut=cut, ratios=(0.1,), variants=("fp32",), exporter="torchscript", times=False)
    found = measure_frontier(chosen)
    assert not found.skipped and [(point.ratio, point.variant) for point in found.points] == [
        (0, "fp32"),
        (0.1, "fp32"),
    ]
    dense, slim = found.points
    assert (
        0 < slim.bytes <= dense.bytes and slim.removed > 0
    )  # what no output needs is in no graph and slim.quality.questions == dense.quality.questions > 0
