"""A round that is tried before it is taken."""

from dataclasses import replace

import pytest
import torch
from tiny_models import FACTORIES, tiny_model

from slimvlm.compress.allocate.budget import Budget
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.criteria.scoring import score_groups
from slimvlm.compress.data.collate import collated, collator_of
from slimvlm.compress.data.samples import load_samples
from slimvlm.compress.models.checkpoint import load_model
from slimvlm.compress.rounds import Planning, plan_in_rounds
from slimvlm.demo import MODEL, SAMPLES

NEEDED = "language.1.attn"  # of the demo: without it no question is answered


def test_an_attention_without_which_the_loss_jumps_stays_whatever_its_score():
    loaded = load_model(MODEL, dtype=torch.float32)
    work = collated(collator_of(loaded), load_samples(SAMPLES / "train.jsonl", limit=16).samples, 16)
    planning = Planning(Budget(0.2, allocator="global"), CRITERIA["magnitude"])
    scores = score_groups(planning.groups(loaded.model), CRITERIA["random"])
    worthless = {key: values * (key != NEEDED) for key, values in scores.values.items()}
    planning = replace(planning, known=replace(scores, values=worthless))
    kept = {}
    for guard in (False, True):
        plan = plan_in_rounds(loaded.model, lambda _: work, replace(planning, guard=guard)).plan
        kept[guard] = len(plan.keep[NEEDED])
        assert plan.removed_fraction == pytest.approx(0.2, abs=0.002)
    assert kept == {False: 2, True: 8}


@pytest.mark.parametrize("name", FACTORIES)
def test_a_guarded_round_meets_its_ratio_and_leaves_the_model_alone(name):
    tiny = tiny_model(name)
    before = {key: value.clone() for key, value in tiny.model.state_dict().items()}
    planning = Planning(Budget(0.2), CRITERIA["magnitude"], guard=True)
    plan = plan_in_rounds(tiny.model, lambda _: [lambda: tiny.inputs(2)], planning).plan
    after = tiny.model.state_dict()
    assert plan.removed_fraction == pytest.approx(0.2, abs=0.02)
    assert after.keys() == before.keys() and all(torch.equal(after[key], value) for key, value in before.items())
