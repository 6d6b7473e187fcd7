"""Criteria: golden examples G2, G3, G4 and G6, grouped-query units, and independence of batching."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from slimvlm.compress.criteria.criterion import CRITERIA, Criterion
from slimvlm.compress.criteria.scoring import score_groups
from slimvlm.compress.errors import CalibrationError
from slimvlm.compress.files.writing import load_tensors
from slimvlm.compress.models.families import TEXTS
from slimvlm.compress.models.families.parts import ENCODER, GATED_MLP
from slimvlm.compress.models.groups import Group
from slimvlm.compress.models.projections import Member
from slimvlm.compress.statistics.loss import poorly_fitted_loss

TAYLOR, UKMI = CRITERIA["taylor"], CRITERIA["ukmi"]
LLAMA = TEXTS["llama"].towers[0]


def mlp_group(size: int, weights: int, modality: str = "language", gated: bool = True) -> Group:
    members = (Member("gate", 0, "channel"), Member("up", 0, "channel"), Member("down", 1, "channel"))
    return Group(
        home=replace(LLAMA, modality=modality), layer=0, part=GATED_MLP, path="b", size=size, unit="channel",
        num_units=size, weights_per_unit=weights, parameters_per_unit=weights,
        members=members if gated else members[1:],
    )  # fmt: skip


def attention_group(heads: int, kv_heads: int, head_dim: int, unit: str, hidden: int = 3, fused: bool = False) -> Group:
    if fused:
        members = [
            Member("qkv", 0, kind, head_dim, part * heads * head_dim) for part, kind in enumerate(("query", "kv", "kv"))
        ]
    else:
        members = [Member(name, 0, "query" if name == "q" else "kv", head_dim) for name in "qkv"]
    members.append(Member("o", 1, "query", head_dim))
    units = {"head": heads, "kv-group": kv_heads, "query-slot": heads // kv_heads}[unit]
    owned = 2 * heads if unit == "query-slot" else 2 * heads + 2 * kv_heads
    weights = owned * head_dim * hidden // units
    return Group(
        home=LLAMA, layer=0, part=ENCODER, path="b", size=heads, unit=unit, num_units=units,
        weights_per_unit=weights, parameters_per_unit=weights, members=tuple(members), kv_heads=kv_heads,
        head_dim=head_dim,
    )  # fmt: skip


def seen(saliency: dict, entropy: dict | None = None) -> SimpleNamespace:
    statistics = {"first": saliency, "angles": entropy or {}}
    return SimpleNamespace(
        seen={
            name: {key: torch.as_tensor(value, dtype=torch.float32) for key, value in statistic.items()}
            for name, statistic in statistics.items()
        }
    )


def scores_of(group: Group, calibration: SimpleNamespace, criterion: Criterion = TAYLOR) -> list[float]:
    return score_groups([group], criterion, calibration).values[group.key].tolist()


def test_golden_g2_gated_mlp_is_the_mean_over_the_weights_of_a_channel():
    gate = torch.tensor([[0.1, -0.2, 0.3], [0, 0.1, -0.1]]).abs().sum(1)
    up = torch.tensor([[0.2, 0.2, -0.2], [0.5, -0.1, 0]]).abs().sum(1)
    down = torch.tensor([[0.3, -0.1], [-0.3, 0.2], [0.1, 0.1]]).abs().sum(0)
    found = scores_of(mlp_group(2, 9), seen({"gate:0": gate, "up:0": up, "down:1": down}))
    assert found == pytest.approx([1.9 / 9, 1.2 / 9])


def golden_g3() -> dict[str, torch.Tensor]:
    rows = torch.arange(12).reshape(4, 3) / 10 - 0.5
    output = (torch.arange(12).reshape(3, 4) - 6) / 10
    return {
        "q:0": rows.abs().sum(1), "k:0": (-rows / 2).abs().sum(1), "v:0": torch.full((4, 3), 0.1).sum(1),
        "o:1": output.abs().sum(0),
    }  # fmt: skip


def test_golden_g3_attention_is_the_mean_over_the_weights_of_a_head():
    group = attention_group(2, 2, 2, "head")
    assert scores_of(group, seen(golden_g3())) == pytest.approx([0.197917, 0.227083], abs=1e-6)


def test_a_fused_projection_scores_like_three_separate_ones():
    found = golden_g3()
    fused = {"qkv:0": torch.cat([found["q:0"], found["k:0"], found["v:0"]]), "o:1": found["o:1"]}
    group = attention_group(2, 2, 2, "head", fused=True)
    assert scores_of(group, seen(fused)) == pytest.approx([0.197917, 0.227083], abs=1e-6)


G4_LOGITS = torch.tensor([[2.0, 0, 0], [0.1, 0, 0], [0.5, 0.2, 0], [0, 0, 0]])
G4_LABELS = torch.tensor([0, 1, 2, 2])


def test_golden_g4_only_poorly_fitted_positions_count():
    assert poorly_fitted_loss(G4_LOGITS, G4_LABELS, 0.4).item() == pytest.approx(1.115841, abs=1e-6)
    assert poorly_fitted_loss(G4_LOGITS, G4_LABELS, None).item() == pytest.approx(0.956128, abs=1e-6)
    two = torch.tensor([0, 2])
    assert poorly_fitted_loss(G4_LOGITS[two], G4_LABELS[two], 0.4).item() == pytest.approx(1.353287, abs=1e-6)
    logits = G4_LOGITS.clone().requires_grad_()
    poorly_fitted_loss(logits, G4_LABELS, 0.4).backward()
    assert logits.grad.abs().sum(1).nonzero().flatten().tolist() == [1, 3]


@pytest.mark.parametrize("threshold", [None, 0.4, 0.0, 1.0])
def test_batches_sum_the_losses_of_their_examples_and_ignore_padding(threshold):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, 11, generator=generator) * 2
    labels = torch.randint(0, 11, (5, 7), generator=generator)
    labels[torch.rand(5, 7, generator=generator) < 0.4] = -100
    labels[3] = -100  # an example without any supervised position adds nothing
    single = sum(poorly_fitted_loss(logits[i], labels[i], threshold) for i in range(5) if i != 3)
    torch.testing.assert_close(poorly_fitted_loss(logits, labels, threshold), single)
    if threshold in (None, 1.0):
        means = [functional.cross_entropy(logits[i], labels[i]) for i in range(5) if i != 3]
        torch.testing.assert_close(single, sum(means))


def test_low_precision_logits_are_computed_in_fp32_and_bad_shapes_refused():
    assert poorly_fitted_loss(G4_LOGITS.bfloat16(), G4_LABELS, 0.4).dtype == torch.float32
    assert poorly_fitted_loss(G4_LOGITS, torch.full((4,), -100), 0.4) == 0
    with pytest.raises(ValueError, match=r"labels \(3,\) do not fit logits \(4, 3\)"):
        poorly_fitted_loss(G4_LOGITS, G4_LABELS[:3], 0.4)


def test_golden_g6_head_entropy_is_averaged_before_it_multiplies():
    group = attention_group(2, 2, 2, "head")
    weights_per_channel = group.weights_per_unit // 2
    importance = torch.tensor([0.4, 0.2, 0.1, 0.3]) * weights_per_channel / 4
    entropy = {"q": [2, 1, 3, 1], "k": [1, 1, 2, 2], "v": [3, 1, 1, 0]}
    found = scores_of(group, seen(dict.fromkeys(("q:0", "k:0", "v:0", "o:1"), importance), entropy), UKMI)
    assert found == pytest.approx([0.45, 0.30])


def test_entropy_is_for_the_language_modality_only():
    saliency = {"gate:0": [1, 2], "up:0": [1, 2], "down:1": [1, 2]}
    entropy = {"gate": [1, 3], "up": [3, 1]}
    assert scores_of(mlp_group(2, 3), seen(saliency, entropy), UKMI) == [2, 4]
    assert scores_of(mlp_group(2, 3, "vision"), seen(saliency), UKMI) == [1, 2]


GQA = {"q:0": [1, 5, 2, 8, 3, 1], "k:0": [10, 20], "v:0": [100, 200], "o:1": [0, 0, 1, 0, 0, 1]}
GQA_ENTROPY = {"q": [1, 2, 3, 4, 5, 6], "k": [1, 3], "v": [2, 4]}


def test_a_kv_group_owns_its_query_heads_and_one_key_and_value_head():
    group = attention_group(6, 2, 1, "kv-group", hidden=1)
    scores = score_groups([group], TAYLOR, seen(GQA))
    assert scores.members[group.key].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert scores.values[group.key].tolist() == pytest.approx([(8 + 1 + 110) / 8, (12 + 1 + 220) / 8])
    with_entropy = scores_of(group, seen(GQA, GQA_ENTROPY), UKMI)
    assert with_entropy == pytest.approx([119 / 8 * (2 + 1 + 2) / 3, 233 / 8 * (5 + 3 + 4) / 3])


def test_a_query_slot_takes_the_lowest_head_of_every_kv_group_and_no_keys():
    group = attention_group(6, 2, 1, "query-slot", hidden=1)
    scores = score_groups([group], TAYLOR, seen(GQA))  # heads: 1 5 3 | 8 3 2
    assert scores.members[group.key].tolist() == [[0, 5], [2, 4], [1, 3]]
    assert scores.values[group.key].tolist() == pytest.approx([3 / 4, 6 / 4, 13 / 4])
    with_entropy = scores_of(group, seen(GQA, GQA_ENTROPY), UKMI)
    assert with_entropy == pytest.approx([3 / 4 * 3.5, 6 / 4 * 4, 13 / 4 * 3])


def test_equal_heads_fill_slots_by_index():
    group = attention_group(4, 2, 1, "query-slot", hidden=1)
    scores = score_groups([group], TAYLOR, seen({key: [1, 1, 1, 1] for key in ("q:0", "o:1")}))
    assert scores.members[group.key].tolist() == [[0, 2], [1, 3]]


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(3, 2), torch.nn.Linear(2, 3)


def test_magnitude_is_the_mean_absolute_weight():
    block, group = Block(), mlp_group(2, 6, gated=False)
    expected = (block.up.weight.abs().sum(1) + block.down.weight.abs().sum(0)) / 6
    found = score_groups([group], CRITERIA["magnitude"], model=block).values[group.key]
    torch.testing.assert_close(found, expected.detach())
    with pytest.raises(ValueError, match="needs the model"):
        score_groups([group], CRITERIA["magnitude"])


@pytest.mark.parametrize("unit", ["kv-group", "query-slot"])
def test_random_scores_follow_the_seed_and_cover_every_index_once(unit):
    groups = [mlp_group(50, 9), attention_group(6, 2, 1, unit)]
    first, again, other = (score_groups(groups, CRITERIA["random"], seed=seed) for seed in (1, 1, 2))
    for group in groups:
        assert torch.equal(first.values[group.key], again.values[group.key])
        assert not torch.equal(first.values[group.key], other.values[group.key])
        assert sorted(first.members[group.key].flatten().tolist()) == list(range(group.size))


def test_a_score_file_holds_values_members_and_the_criterion(tmp_path):
    groups = [mlp_group(5, 9), attention_group(6, 2, 1, "query-slot")]
    scores = score_groups(groups, CRITERIA["random"], seed=3)
    scores.save(tmp_path / "scores.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["scores.safetensors"]
    tensors, facts = load_tensors(tmp_path / "scores.safetensors")
    expected = {"name": "random", "saliency": "random", "tokens": "all", "threshold": None, "entropy": False}
    assert facts["criterion"] == expected
    for name in ("values", "members"):
        for key, value in getattr(scores, name).items():
            assert torch.equal(tensors[f"{name}/{key}"], value)


def test_unusable_statistics_are_refused():
    group = mlp_group(2, 3)
    saliency = {"gate:0": [1, float("nan")], "up:0": [1, 2], "down:1": [1, 2]}
    with pytest.raises(CalibrationError, match=r"language\.0\.mlp are not finite"):
        scores_of(group, seen(saliency))
    with pytest.raises(ValueError, match="have 3 entries, not 2"):
        scores_of(group, seen({**saliency, "gate:0": [1, 2, 3]}))
    with pytest.raises(ValueError, match="needs calibration"):
        score_groups([group], TAYLOR)


def test_a_threshold_that_is_no_probability_is_refused():
    with pytest.raises(ValueError, match="no probability"):
        replace(UKMI.tokens, threshold=4.0)


def test_wanda_sp_is_the_column_sums_of_weights_times_inputs_over_their_mean_in_the_group():
    block, group = Block(), mlp_group(2, 6, gated=False)
    with torch.no_grad():
        block.down.weight.copy_(torch.tensor([[1.0, -2], [3, 0], [-1, 1]]))
    norms = SimpleNamespace(seen={"input-norms": {"down": torch.tensor([2.0, 10]), "up": torch.tensor([7.0, 7, 7])}})
    found = score_groups([group], CRITERIA["wanda-sp"], norms, block).values[group.key]
    assert found.tolist() == pytest.approx([10 / 20, 30 / 20])  # 2 (1 + 3 + 1) and 10 (2 + 0 + 1), their mean 20


def test_flap_is_the_fluctuation_of_what_is_read_standardised_in_the_group_and_the_mean_of_it_over_a_head():
    block, mlp, attention = Block(), mlp_group(2, 6, gated=False), attention_group(2, 1, 2, "query-slot")
    block.o = torch.nn.Linear(4, 3)
    with torch.no_grad():
        block.down.weight.copy_(torch.tensor([[1.0, -2], [3, 0], [-1, 1]]))
        block.o.weight.copy_(torch.eye(3, 4) + torch.tensor([[0.0, 0, 0, 1]] + 2 * [[0.0] * 4]))
    seen = {"down": torch.tensor([3.0, 4]), "o": torch.tensor([1.0, 2, 6, 7])}
    found = score_groups([mlp, attention], CRITERIA["flap"], SimpleNamespace(seen={"fluctuation": seen}), block)
    # 33 and 20; 1, 2, 6 and 7 about their mean 4, over their deviation, in pairs: the least of all becomes 0.
    halves, spread = 0.5**0.5, (26 / 3) ** 0.5
    lowest = -2.5 / spread
    assert found.values[mlp.key].tolist() == pytest.approx([halves - lowest, -halves - lowest])
    assert found.values[attention.key].tolist() == pytest.approx([0, 5 / spread])
    assert found.members[attention.key].tolist() == [[0], [1]]


def test_flap_finds_nothing_to_tell_apart_where_nothing_fluctuates():
    seen = SimpleNamespace(seen={"fluctuation": {"down": torch.zeros(2)}})
    assert (
        score_groups([mlp_group(2, 6, gated=False)], CRITERIA["flap"], seen, Block()).values["language.0.mlp"].sum()
        == 0
    )
