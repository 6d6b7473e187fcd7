"""Token pools: the golden numbers of the specification of ATV-Pruning, and a literal loop over every family."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from tiny_models import FACTORIES, IMAGE_TOKEN, Tiny, tiny_model
from torch import Tensor, nn

from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.criteria.scoring import score_groups
from slimvlm.compress.data.questions import TEXT, Question, stream_through
from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_blocks, find_groups, find_units
from slimvlm.compress.options import PlanOptions
from slimvlm.compress.stages.plan import chosen_criterion
from slimvlm.compress.statistics.collect import collect
from slimvlm.compress.statistics.collector import Side
from slimvlm.compress.statistics.collectors.turning import turn
from slimvlm.compress.statistics.pools import check_pool, choice, drifting
from slimvlm.compress.statistics.rows import STATISTICS, CalibrationOptions, token_rule

APART = ("clip", "siglip")
MIXED = sorted(FACTORIES.keys() - set(APART))
# Two samples of the specification: text rows, image rows into the block and out of it.
SAMPLES = (
    ([(1, 0), (0, 2), (1, 1)], [(1, 0), (0, 1), (1, 1), (2, 0)], [(1, 1), (0, 1), (1, 0), (0, 2)]),
    ([(2, 1), (0, 1)], [(3, 4), (1, 0)], [(4, 3), (1, 0)]),
)


class Turner(nn.Module):
    """A block that gives what it is told to."""

    def forward(self, before: Tensor, after: Tensor) -> tuple[Tensor]:
        return (after,)


def asked(images: Tensor, real: Tensor | None = None) -> Question:
    return Question({}, None, None, None, {TEXT: real}, images=images)


def golden() -> tuple[Question, Tensor, Tensor]:
    """(question, states into the block, out of it) of SAMPLES in one batch, the second padded with large states."""
    before, after = torch.full((2, 2, 7, 2), 9.0)
    images, real = torch.zeros(2, 2, 7, dtype=torch.bool)
    for index, (text, visual, turned) in enumerate(SAMPLES):
        rows = torch.tensor([*text, *visual]).float()
        before[index, : len(rows)] = rows
        after[index, : len(rows)] = torch.tensor([*text, *turned]).float()
        images[index, len(text) : len(rows)] = real[index, : len(rows)] = True
    return asked(images, real), before, after


def drift_of(question: Question, before: Tensor, after: Tensor) -> tuple[Mapping[str, Sequence[Tensor]], dict]:
    block = Turner()
    drift = STATISTICS["drift"].make()
    with drift.watch([Side("block", block, (), stream=TEXT, block="block")]):
        drift.see(question)
        block(before, after)
        return drift.turned, drift.finish(lambda tensor, how: None)


def squares(question: Question, read: Tensor) -> Tensor:
    """Of the inputs of a linear in the block, over the tokens that count, per sample (as the reference has it)."""
    linear, norms = nn.Linear(read.shape[-1], 1), STATISTICS["input-norms"].make()
    with norms.watch([Side("linear", linear, (1,), stream=TEXT, block="block")]):
        norms.see(question)
        linear(read)
        return norms.finish(lambda tensor, how: None)["linear"].square() / len(read)


@pytest.mark.parametrize(
    ("alpha", "chosen", "sums"),
    [
        (0.5, [[], []], (3, 3.5)),
        (1, [[3], [0]], (9.5, 11.5)),
        (2, [[0, 3], [0]], None),
        (8, [[0, 2, 3], [0, 1]], (11, 12)),
        (1e9, [[0, 2, 3], [0, 1]], (11, 12)),
    ],
)
def test_golden_tokens_of_atv_are_chosen_and_summed(alpha: float, chosen: list, sums: tuple | None) -> None:
    question, before, after = golden()
    turned, means = drift_of(question, before, after)
    expected = [1 - math.sqrt(0.5), 0, 1 - math.sqrt(0.5), 1, 0.04, 0]
    torch.testing.assert_close(turned["block"][0], torch.tensor(expected), atol=1e-6, rtol=0)
    assert means["block"].item() == pytest.approx(0.270964, abs=1e-6)
    masks = drifting(alpha, turned, means)(0, question)
    picked = [
        (mask & image)[image].nonzero()[:, 0].tolist()
        for mask, image in zip(masks["block"], question.images, strict=True)
    ]
    assert picked == chosen
    assert all(masks["block"][~question.images & question.masks[TEXT]])
    if sums is not None:
        torch.testing.assert_close(squares(Question({}, None, None, None, masks), before), torch.tensor(sums) * 1.0)


def test_golden_sums_of_text_alone_and_of_all_tokens_prune_other_weights() -> None:
    question, before, _ = golden()
    metrics = []
    for name, sums in (("text", (3, 3.5)), ("all", (11, 12.5))):
        masks = choice(name)(0, question)
        found = squares(Question({}, None, None, None, masks), before)
        torch.testing.assert_close(found, torch.tensor(sums) * 1.0)
        metrics.append(torch.tensor([1.09, 1.0]) * found.sqrt())
    torch.testing.assert_close(torch.stack(metrics), torch.tensor([[1.887935, 1.870829], [3.615121, 3.535534]]))


def test_golden_structured_scores_lose_and_keep_a_purely_visual_channel() -> None:
    rows = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 3], [2, 0, 0], [0, 0.5, 0]])[None]
    question = asked(torch.tensor([[False, False, True, True, True]]))
    norms = torch.tensor([[1.0, 0, 2], [0, 3, -1]]).norm(dim=0)
    pools = {
        "text": (choice("text"), (1, 3, 0)),
        "atv": (
            drifting(1, {"block": [torch.tensor([1.0, 0.5, 0.2])]}, {"block": torch.tensor(0.5)}),
            (1, 3, 6.708204),
        ),
        "all": (choice("all"), (2.236068, 3.354102, 6.708204)),
    }
    for pool, expected in pools.values():
        found = squares(Question({}, None, None, None, pool(0, question)), rows).sqrt()
        torch.testing.assert_close(norms * found, torch.tensor(expected) * 1.0)


def test_budgets_are_rounded_half_to_even() -> None:
    images = torch.arange(20).expand(4, 20) >= torch.tensor([[1], [3], [5], [7]])
    real = images.cumsum(1) <= 8
    drift = torch.linspace(1, 0, 32)
    masks = drifting(1, {"block": [drift]}, {"block": torch.tensor(0.5)})(0, asked(images, real))
    assert (masks["block"] & images).sum(1).tolist() == [0, 2, 2, 4]


@pytest.mark.parametrize("cosine", [0.999, 0.9985, 0.99, 0.95])
def test_drift_is_not_rounded_to_the_steps_of_bfloat16(cosine: float) -> None:
    before = torch.tensor([[[1.0, 0.0]]], dtype=torch.bfloat16)
    after = torch.tensor([[[cosine, math.sqrt(1 - cosine**2)]]], dtype=torch.bfloat16)
    exact = 1 - after[0, 0, 0].double() / after[0, 0].double().norm()
    assert turn((before,), {}, after).item() == pytest.approx(exact.item(), abs=1e-6)


def test_a_sample_with_no_token_of_the_pool_counts_with_all_and_padding_never_does() -> None:
    images = torch.tensor([[True, True, False, False], [True, True, True, False], [False, False, False, False]])
    real = torch.tensor([[True, True, True, False], [True, True, True, False], [True, True, False, False]])
    question = asked(images, real)
    assert choice("text")(0, question)[TEXT].sum(1).tolist() == [1, 3, 2]
    assert choice("image")(0, question)[TEXT].sum(1).tolist() == [2, 3, 2]
    masks = drifting(1, {"block": [torch.ones(5)]}, {"block": torch.tensor(1.0)})(0, question)
    assert masks["block"].sum(1).tolist() == [2, 3, 2]


def norms_of(tiny: Tiny, batches: Sequence[dict], tokens: str) -> Mapping[str, Tensor]:
    family = find_family(tiny.model.config)
    options = CalibrationOptions(("input-norms",), token_rule(tokens))
    found = collect(tiny.model, family, find_groups(tiny.model, family), batches, options)
    assert found.passes == 1 + tokens.startswith("atv")
    return found.seen["input-norms"]


def outputs_of(tiny: Tiny) -> dict[str, str]:
    """Path of the last output projection of every block that image and text go through -> the block's."""
    family = find_family(tiny.model.config)
    mixed = [tower for tower in family.towers if stream_through(family, tower) == TEXT]
    return {
        f"{tower.blocks}.{layer}.{tower.parts[-1].output}": f"{tower.blocks}.{layer}"
        for tower in mixed
        for layer in range(len(tiny.model.get_submodule(tower.blocks)))
    }


@pytest.mark.parametrize("name", MIXED)
def test_pools_of_every_family_are_what_a_literal_loop_over_its_tokens_takes(name: str) -> None:
    tiny = tiny_model(name)
    batches, paths, heard = [tiny.inputs(3)], outputs_of(tiny), {}

    def hear(place: str, args: tuple, kwargs: dict, output: object) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        heard[place] = before.detach(), (output[0] if isinstance(output, tuple) else output).detach()

    handles = [
        tiny.model.get_submodule(place).register_forward_hook(
            lambda _, *rest, place=place: hear(place, *rest), with_kwargs=True
        )
        for place in (*paths, *paths.values())
    ]
    with torch.no_grad():
        tiny.model(**batches[0])
    for handle in handles:
        handle.remove()
    image = batches[0]["input_ids"] == IMAGE_TOKEN
    first, *_ = drifts = {
        path: (1 - torch.cosine_similarity(*heard[block], dim=-1)).view_as(image) for path, block in paths.items()
    }
    alpha = round(2.3 / 9 / drifts[first][image].mean().item(), 2)  # two image tokens per sample of the first block
    found = {tokens: norms_of(tiny, batches, tokens) for tokens in ("all", "text", "image", f"atv({alpha})")}
    for path, drift in drifts.items():
        read = heard[path][0].view(3, image.shape[1], -1)
        rho = min(1.0, alpha * drift[image].mean().item())
        taken = ~image
        for sample in range(3):
            count = round(rho * int((~image[sample]).sum()))
            best = sorted(image[sample].nonzero()[:, 0].tolist(), key=lambda at: -drift[sample, at].item())[:count]
            taken[sample, best] = True
        assert path != first or (taken & image).sum(1).tolist() == [2, 2, 2]
        for norms, mask in zip(found.values(), (image | True, ~image, image, taken), strict=True):
            torch.testing.assert_close(norms[path], read[mask].norm(dim=0), rtol=1e-4, atol=1e-5)
    vision = next(path for path in found["all"] if "vis" in path)
    assert all(found[tokens][vision].equal(found["all"][vision]) for tokens in found)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "blip2_t5"])
@pytest.mark.parametrize("tokens", ["text", "image", "atv(2)"])
def test_pools_do_not_depend_on_batches_their_order_or_a_bound_on_memory(tokens: str, name: str) -> None:
    tiny = tiny_model(name)
    family, groups = find_family(tiny.model.config), find_groups(tiny.model, find_family(tiny.model.config))
    whole = tiny.inputs(3)
    rows = len(whole["pixel_values"]) // 3
    single = [
        {
            key: value[index * n : (index + 1) * n]
            for key, value in whole.items()
            for n in [rows if "pixel" in key else 1]
        }
        for index in (2, 0, 1)
    ]
    options = CalibrationOptions(("moments", "input-norms"), token_rule(tokens))
    one = collect(tiny.model, family, groups, [whole], options)
    other = collect(tiny.model, family, groups, single, options)
    tight = CalibrationOptions(options.statistics, options.tokens, grad_memory_bytes=4 * 48**2)
    bound = collect(tiny.model, family, groups, single, tight)
    assert bound.passes > other.passes
    for found in (other, bound):
        for statistic, seen in one.seen.items():
            for path, value in seen.items():
                torch.testing.assert_close(found.seen[statistic][path], value, rtol=1e-3, atol=1e-3)


def test_without_image_tokens_beside_it_atv_is_the_text_pool() -> None:
    tiny = tiny_model("llava")
    text, none = (norms_of(tiny, [tiny.inputs(2)], tokens) for tokens in ("text", "atv(0.0001)"))
    assert all(none[path].equal(value) for path, value in text.items())


@pytest.mark.parametrize("name", APART)
def test_a_pool_is_refused_where_no_sequence_holds_images_and_text(name: str) -> None:
    config = tiny_model(name).model.config
    for tokens in ("text", "image", "atv"):
        with pytest.raises(UnsuitableOptionError, match=f"{name} reads images and texts apart"):
            check_pool(token_rule(tokens), find_family(config), config)
    check_pool(token_rule("all"), find_family(config), config)


@pytest.mark.parametrize("name", ["", "texts", "atv()", "atv(-1)", "text(1)", "atv(x)", "ATV", "atv(1", "atv(1e3)"])
def test_an_unknown_pool_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(
        UnsuitableOptionError, match=r"choose one of all, text, image, atv, the last also as 'atv\(ALPHA"
    ):
        token_rule(name)


@pytest.mark.parametrize(("criterion", "row"), CRITERIA.items())
def test_criteria_that_need_a_forward_alone_take_a_pool_and_others_refuse_it(
    criterion: str, row: object, tmp_path
) -> None:
    options = PlanOptions(model="m", data=tmp_path, criterion=criterion, tokens="atv(0.5)")
    if row.statistics and not row.learns:
        chosen = chosen_criterion(options)
        assert chosen.tokens == token_rule("atv(0.5)") and chosen.facts()["tokens"] == "atv(0.5)"
    else:
        with pytest.raises(
            UnsuitableOptionError, match=r"--tokens atv\(0.5\) is for criteria that need a forward alone"
        ):
            chosen_criterion(options)


def test_how_far_a_block_turns_the_image_tokens_is_told_apart_from_the_text_for_depth() -> None:
    tiny = tiny_model("qwen3_vl")
    family = find_family(tiny.model.config)
    found = {}
    for tokens in ("all", "text", "image"):
        options = CalibrationOptions(("turning",), token_rule(tokens))
        seen = collect(tiny.model, family, find_blocks(tiny.model, family), [tiny.inputs(2)], options).seen
        found[tokens] = {path: value.item() for path, value in seen["turning"].items() if "language" in path}
    for path, mean in found["all"].items():
        assert mean == pytest.approx((9 * found["text"][path] + 4 * found["image"][path]) / 13, abs=1e-6)


@pytest.mark.parametrize("name", MIXED)
def test_every_criterion_without_gradients_tells_the_units_of_every_family_apart_by_a_pool(name: str) -> None:
    tiny = tiny_model(name)
    family = find_family(tiny.model.config)
    for row in (row for row in CRITERIA.values() if row.statistics and not row.learns):
        criterion, values = replace(row, tokens=token_rule("atv")), {}
        groups = find_units(tiny.model, family, row.units)
        for pool in (row, criterion):
            seen = collect(tiny.model, family, groups, [tiny.inputs(2)], pool.calibration())
            values[pool] = score_groups(groups, pool, seen, tiny.model).values
        for key, found in values[criterion].items():
            assert found.isfinite().all() and len(set(found.tolist())) > len(found) // 2, (row.name, key)
        assert any(not found.equal(values[row][key]) for key, found in values[criterion].items()), row.name
