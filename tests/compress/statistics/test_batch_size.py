"""How many samples go through a model at once, and that nothing but memory depends on it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import FACTORIES, tiny_model
from tiny_processors import tiny_image, tiny_processor

from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.data.collate import Collator
from slimvlm.compress.data.records import Turn
from slimvlm.compress.data.samples import Sample
from slimvlm.compress.evaluation import evaluate
from slimvlm.compress.models.checkpoint import Loaded
from slimvlm.compress.models.computing import give_back_memory
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.statistics import collect
from slimvlm.compress.statistics.collect import bytes_kept
from slimvlm.compress.statistics.rows import STATISTICS

GATE = CRITERIA["gate"].calibration()
GENERATIVE = [name for name in FACTORIES if name not in ("clip", "siglip")]


def loaded_of(name: str) -> tuple[Loaded, Collator]:
    model = tiny_model(name).model.eval()
    family = find_family(model.config)
    loaded = Loaded(model, tiny_processor(name), family, "", Path())
    return loaded, Collator(loaded.processor, family, model.config)


def samples_in(folder: Path) -> list[Sample]:
    made = []
    for index, answer in enumerate(("a cat", "two", "a small red house and a tree")):
        path = folder / f"{index}.png"
        tiny_image(seed=index).save(path)
        made.append(Sample(path, (Turn("what ?", (answer,)),), str(index)))
    return made


@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_what_a_forward_keeps_is_counted_and_leaves_no_trace(name: str) -> None:
    tiny = tiny_model(name)
    family = find_family(tiny.model.config)
    groups = find_groups(tiny.model, family)
    asked = [parameter.requires_grad for parameter in tiny.model.parameters()]
    two, eight = (bytes_kept(tiny.model, family, groups, tiny.inputs(count), GATE) for count in (2, 8))
    assert 3.0 * two < eight < 5.5 * two  # the tiny models' heads on B x B similarities grow faster
    assert [parameter.requires_grad for parameter in tiny.model.parameters()] == asked
    assert all(parameter.grad is None for parameter in tiny.model.parameters())
    assert not any(module._forward_pre_hooks for module in tiny.model.modules())


@pytest.mark.parametrize("criterion", CRITERIA)
def test_what_a_forward_keeps_is_known_of_every_criterion(criterion: str) -> None:
    tiny, options = tiny_model("llava"), CRITERIA[criterion].calibration()
    family = find_family(tiny.model.config)
    gate, kept = (
        bytes_kept(tiny.model, family, find_groups(tiny.model, family), tiny.inputs(3), one) for one in (GATE, options)
    )
    learns = any(STATISTICS[name].reads == "backward" for name in options.statistics)
    assert kept > 0.9 * gate if learns else kept == 0


@pytest.mark.parametrize("name", GENERATIVE)
def test_a_calibration_batch_is_as_large_as_the_bound_allows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, collator = loaded_of(name)
    samples = samples_in(tmp_path)
    groups = find_groups(loaded.model, loaded.family)
    kept = bytes_kept(loaded.model, loaded.family, groups, collator.training(samples[2:]), GATE)
    assert collect.calibration_batch(loaded, collator, samples, GATE, 16) == 16
    monkeypatch.setattr(collect, "ACTIVATIONS", 0)
    for bound, found in ((0, 1), (3.5 * kept, 3), (100 * kept, 16)):
        monkeypatch.setattr(collect, "LEAST", int(bound))
        assert collect.calibration_batch(loaded, collator, samples, GATE, 16) == found


@pytest.mark.parametrize(("name", "criterion"), [("llava", "fisher"), ("clip", "gate")])
def test_a_batch_that_is_part_of_what_is_measured_stays(
    name: str, criterion: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "ACTIVATIONS", 0)
    monkeypatch.setattr(collect, "LEAST", 0)
    options = CRITERIA[criterion].calibration()
    assert collect.calibration_batch(*loaded_of(name), samples_in(tmp_path), options, 16) == 16


@pytest.mark.parametrize("name", GENERATIVE)
def test_looking_at_logits_row_by_row_gives_the_same_rows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, collator = loaded_of(name)
    found = []
    for widened in (evaluate.WIDENED, 1):
        monkeypatch.setattr(evaluate, "WIDENED", widened)
        found.append(evaluate.evaluate(loaded.model, collator, samples_in(tmp_path)).rows)
    for whole, apart in zip(*found, strict=True):
        assert apart.loss == pytest.approx(whole.loss, rel=1e-5)
        assert replace(apart, loss=0.0) == replace(whole, loss=0.0)


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="resident memory is read from /proc")
def test_memory_of_a_model_that_is_gone_is_given_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    torch.empty(30 * 2**20, dtype=torch.uint8)  # whose end makes glibc keep blocks of this size from now on
    blocks = [torch.ones(2**20, dtype=torch.uint8) for _ in range(96)]
    pinned = blocks[-1]
    before = resident()
    blocks.clear()
    give_back_memory()
    assert pinned.numel()
    assert before - resident() > 80 * 2**20
