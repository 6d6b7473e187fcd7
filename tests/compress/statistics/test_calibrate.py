"""Calibration: statistics against a literal loop; what holds whatever the batching, memory bound or process count."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny_models import FACTORIES, IMAGE_TOKEN, Tiny, tiny_model

from slimvlm.compress.criteria.criterion import CRITERIA, Criterion
from slimvlm.compress.errors import CalibrationError
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_groups, find_units
from slimvlm.compress.progress import Progress, silent
from slimvlm.compress.statistics.collect import Calibration, collect
from slimvlm.compress.statistics.rows import STATISTICS, CalibrationOptions, Statistic, TokenRule

UKMI = CRITERIA["ukmi"]
BINS = 100


def run(tiny: Tiny, batches: list, criterion: Criterion = UKMI, progress: Progress = silent, **options) -> Calibration:
    return collect_from(tiny, batches, criterion.calibration(**options), progress)


def collect_from(tiny: Tiny, batches: list, options: CalibrationOptions, progress: Progress = silent) -> Calibration:
    family = find_family(tiny.model.config)
    units = next((STATISTICS[name].units for name in options.statistics), "width")
    groups = find_units(tiny.model, family, units)
    return collect(tiny.model, family, groups, batches, options, progress)


def uneven_samples(name: str, count: int = 4) -> list[dict[str, torch.Tensor]]:
    """Single samples of growing text length; every one has its own image."""
    generator = torch.Generator().manual_seed(7)
    samples = []
    for index in range(count):
        images = 5 if name.startswith("blip2") else 16
        text = torch.randint(3, IMAGE_TOKEN - 1, (1, 6 + 2 * index), generator=generator)
        ids = torch.cat([torch.full((1, images), IMAGE_TOKEN), text], dim=1)
        labels = ids.clone()
        labels[:, : images + 2] = -100
        if name == "blip2_t5":
            labels = torch.randint(3, IMAGE_TOKEN - 1, (1, 3 + index), generator=generator)
        pixels = torch.randn(1, 3, 16, 16, generator=generator)
        samples.append(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}
        )
    return samples


def padded(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The samples as one batch, padded on the right."""
    batch = {}
    for key, filler in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        rows = [sample[key][0] for sample in samples]
        batch[key] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)
    return {**batch, "pixel_values": torch.cat([sample["pixel_values"] for sample in samples])}


def assert_same(left: Calibration, right: Calibration, rtol: float = 1e-4) -> None:
    assert left.seen.keys() == right.seen.keys()
    for name, statistic in left.seen.items():
        assert statistic.keys() == right.seen[name].keys()
        for key, value in statistic.items():
            other = right.seen[name][key]
            if name == "angles":  # a cosine on the edge of a bin may fall on either side after fp32 rounding
                assert ((value - other).abs() < 1e-5).float().mean() > 0.95, key
            else:
                torch.testing.assert_close(value, other, rtol=rtol, atol=1e-6 * value.max().item() + 1e-12, msg=key)


def literal_selection(logits: torch.Tensor, labels: torch.Tensor, threshold: float) -> torch.Tensor:
    """One example: its labelled positions whose top-1 probability is at most max(T, smallest), bool [L]."""
    top = logits.float().softmax(-1).max(-1).values
    return (labels != -100) & (top <= max(threshold, top[labels != -100].min().item()))


def aligned(tiny: Tiny, sample: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of one example, position by position."""
    logits, labels = tiny.model(**sample).logits[0], sample["labels"][0]
    return (logits[:-1], labels[1:]) if find_family(tiny.model.config).kind == "decoder" else (logits, labels)


def literal_gradients(
    tiny: Tiny, sample: dict[str, torch.Tensor], paths: list[str], threshold: float
) -> list[torch.Tensor]:
    """Per-example gradients (zeros where the loss does not reach)."""
    logits, labels = aligned(tiny, sample)
    chosen = literal_selection(logits, labels, threshold)
    loss = torch.nn.functional.cross_entropy(logits[chosen].float(), labels[chosen])
    weights = [tiny.model.get_submodule(path).weight for path in paths]
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]


def literal_entropy(weight: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(entropy per row, rows none of whose cosines lies on the edge of a bin)."""
    weight, tokens = weight.detach().double(), tokens.double()
    cosine = (tokens @ weight.T) / (tokens.norm(dim=1)[:, None] * weight.norm(dim=1))
    place = (cosine + 1) / 2 * BINS
    clear = ((place - place.round()).abs() > 1e-3).all(0)
    entropies = []
    for row in place.floor().long().clamp(max=BINS - 1).T:
        share = torch.bincount(row, minlength=BINS) / len(row)
        entropies.append(-(share * (share + 1e-12).log()).sum().item())
    return torch.tensor(entropies), clear


@pytest.mark.parametrize("name", list(FACTORIES))
def test_every_family_gives_a_value_per_row_or_column_and_entropies_in_range(name: str) -> None:
    tiny = tiny_model(name)
    family = find_family(tiny.model.config)
    groups = find_groups(tiny.model, family)
    seen = run(tiny, [tiny.inputs(2), tiny.inputs(2)])
    members = [(g, m) for g in groups for m in g.members if not m.norm]
    assert set(seen.seen["first"]) == {f"{m.path}:{m.dim}" for _, m in members}
    for _, member in members:
        value = seen.seen["first"][f"{member.path}:{member.dim}"]
        assert value.shape == (tiny.model.get_submodule(member.path).weight.shape[member.dim],)
        assert value.dtype == torch.float32 and value.isfinite().all() and (value >= 0).all()
    assert sum(value.any() for value in seen.seen["first"].values()) > len(seen.seen["first"]) * 0.6
    assert set(seen.seen["angles"]) == {m.path for g, m in members if g.modality == "language" and m.dim == 0}
    for path, value in seen.seen["angles"].items():
        assert value.shape == (tiny.model.get_submodule(path).weight.shape[0],)
        assert (value >= 0).all() and (value <= math.log(BINS) + 1e-5).all() and value.any()
    assert seen.samples == 4 and seen.passes == 1


@pytest.mark.parametrize(
    ("name", "image", "text", "answer"), [("llava", 16, 9, 4), ("blip2_t5", 5, 9 + 4, 4), ("clip", 16, 8, 0)]
)
def test_image_text_and_answer_tokens_are_counted_apart(name: str, image: int, text: int, answer: int) -> None:
    tiny = tiny_model(name)
    seen = run(tiny, [tiny.inputs(2)] * 3, CRITERIA["taylor"])
    assert (seen.image_tokens, seen.text_tokens, seen.selected_tokens) == (6 * image, 6 * text, 6 * answer)


@pytest.mark.parametrize("name", ["llava", "blip2_t5"])
def test_statistics_equal_a_literal_loop_over_examples(name: str) -> None:
    tiny, samples = tiny_model(name), uneven_samples(name)
    # A threshold above and below the confidences of a random model.
    criterion = replace(UKMI, statistics=("first", "input-norms"), tokens=TokenRule("low", 0.03))
    seen = run(tiny, [padded(samples[:3]), padded(samples[3:])], criterion)
    paths = sorted({key.rpartition(":")[0] for key in seen.seen["first"]})
    inputs: dict[str, list[torch.Tensor]] = {path: [] for path in seen.seen["input-norms"]}

    def remember(path: str, _: object, args: tuple[torch.Tensor, ...], __: object) -> None:
        inputs[path].append(args[0].detach().flatten(0, -2))

    handles = [tiny.model.get_submodule(p).register_forward_hook(partial(remember, p)) for p in inputs]
    sums = [torch.zeros_like(tiny.model.get_submodule(path).weight) for path in paths]
    for sample in samples:
        for total, grad in zip(sums, literal_gradients(tiny, sample, paths, 0.03), strict=True):
            total += grad
    for handle in handles:
        handle.remove()
    for path, total in zip(paths, sums, strict=True):
        saliency = (tiny.model.get_submodule(path).weight * total).abs()
        for dim in (0, 1):
            if f"{path}:{dim}" in seen.seen["first"]:
                torch.testing.assert_close(
                    seen.seen["first"][f"{path}:{dim}"], saliency.sum(1 - dim).detach(), rtol=2e-4, atol=1e-7
                )
    chosen = sum(int(literal_selection(*aligned(tiny, sample), 0.03).sum()) for sample in samples)
    assert seen.selected_tokens == chosen < sum(int((sample["labels"] != -100).sum()) for sample in samples)
    for path, tokens in inputs.items():
        torch.testing.assert_close(seen.seen["input-norms"][path], torch.cat(tokens).norm(dim=0))
        if path in seen.seen["angles"]:
            expected, clear = literal_entropy(tiny.model.get_submodule(path).weight, torch.cat(tokens))
            assert clear.float().mean() > 0.5
            torch.testing.assert_close(seen.seen["angles"][path][clear], expected[clear], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("statistic", STATISTICS.values(), ids=STATISTICS)
def test_what_needs_a_forward_only_builds_no_graph_and_gets_no_backward_pass(statistic: Statistic) -> None:
    tiny, built, read = tiny_model("llava"), [], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: built.append(1) or t, lambda t: read.append(1) or t):
        seen = collect_from(tiny, [tiny.inputs(2)] * 2, CalibrationOptions((statistic.name,)))
    assert seen.seen[statistic.name] and bool(built) == bool(read) == (statistic.reads == "backward")


@pytest.mark.parametrize("variant", ["vectorized", "second", "mix", "fisher"])
def test_other_saliencies_equal_their_formulas_over_micro_batches(variant: str) -> None:
    tiny, samples = tiny_model("llava"), uneven_samples("llava")
    seen = run(tiny, samples, replace(UKMI, statistics=(variant,), angles=None))
    paths = sorted({key.rpartition(":")[0] for key in seen.seen[variant]})
    grads = [literal_gradients(tiny, sample, paths, 0.4) for sample in samples]
    for index, path in enumerate(paths):
        weight = tiny.model.get_submodule(path).weight.detach()
        total = sum(g[index] for g in grads)
        squares = sum(g[index] ** 2 for g in grads)
        second = weight * (squares / len(samples)) * weight
        for dim in (0, 1):
            if f"{path}:{dim}" not in seen.seen[variant]:
                continue
            expected = {
                "vectorized": (weight * total).sum(1 - dim).abs(),
                "second": second.sum(1 - dim),
                "mix": (weight * total - 0.5 * second).abs().sum(1 - dim),
                "fisher": (weight**2 * squares).sum(1 - dim),
            }[variant]
            torch.testing.assert_close(seen.seen[variant][f"{path}:{dim}"], expected, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["llava", "blip2_opt", "blip2_t5"])
def test_statistics_do_not_depend_on_batch_size_padding_or_order(name: str) -> None:
    tiny, samples = tiny_model(name), uneven_samples(name)
    one = run(tiny, samples)
    four = run(tiny, [padded(samples)])
    shuffled = run(tiny, [padded([samples[3], samples[0]]), padded([samples[2], samples[1]])])
    assert_same(one, four)
    assert_same(one, shuffled)
    counts = ("samples", "image_tokens", "text_tokens", "selected_tokens")
    assert [getattr(one, c) for c in counts] == [getattr(four, c) for c in counts]


@pytest.mark.parametrize("variant", ["first", "mix"])
def test_a_gradient_bound_takes_more_passes_and_gives_the_same_scores(variant: str) -> None:
    tiny, samples = tiny_model("llava"), uneven_samples("llava", 2)
    criterion = replace(UKMI, statistics=(variant,))
    bound = 20_000
    held, hooked = [], []
    first_linear = tiny.model.get_submodule("model.language_model.layers.0.self_attn.q_proj")

    def look(_: str, done: int, total: int) -> None:
        held.append(sum(4 * p.grad.numel() for p in tiny.model.parameters() if p.grad is not None))
        hooked.append(bool(first_linear._forward_hooks))
        assert done <= total

    bounded = run(tiny, samples, criterion, look, grad_memory_bytes=bound)
    free = run(tiny, samples, criterion)
    assert bounded.passes > 2 and free.passes == 1
    assert max(held) <= bound and len(held) == bounded.passes * len(samples)
    assert hooked == [True] * len(samples) + [False] * (len(held) - len(samples))  # angles: in the first pass only
    assert_same(free, bounded)


def test_a_bound_below_the_largest_weight_is_refused_by_name() -> None:
    tiny = tiny_model("llava")
    with pytest.raises(CalibrationError, match=r"gradient bound of 100 bytes.*q_proj.*needs 4096 bytes"):
        run(tiny, [tiny.inputs(1)], grad_memory_bytes=100)


@pytest.mark.parametrize("variant", ["fisher", "second"])
def test_squares_hold_no_gradient_between_batches(variant: str) -> None:
    tiny = tiny_model("llava")
    held = []
    run(
        tiny,
        [tiny.inputs(1)] * 2,
        Criterion("x", (variant,)),
        lambda *_: held.append([p for p in tiny.model.parameters() if p.grad is not None]),
        grad_memory_bytes=1,
    )
    assert held == [[], []]


@pytest.mark.parametrize("host", [False, True])
def test_bf16_weights_are_summed_in_fp32(host: bool) -> None:
    tiny = tiny_model("llava")
    tiny.model.to(torch.bfloat16)
    samples = [{**s, "pixel_values": s["pixel_values"].bfloat16()} for s in uneven_samples("llava")]
    seen = run(tiny, samples * 3, CRITERIA["taylor"], host_sums=host)
    path = "model.language_model.layers.0.mlp.up_proj"
    total = torch.zeros(40, 32)
    for sample in samples * 3:
        total += literal_gradients(tiny, sample, [path], 1.0)[0].float()
    expected = (tiny.model.get_submodule(path).weight.float() * total).abs().sum(1)
    torch.testing.assert_close(seen.seen["first"][f"{path}:0"], expected.detach(), rtol=1e-2, atol=1e-4)
    assert all(value.dtype == torch.float32 for value in seen.seen["first"].values())


def test_model_is_left_as_it_was_even_after_an_error() -> None:
    tiny = tiny_model("llava")
    model = tiny.model
    model(**tiny.inputs(1))  # transformers hooks a module of its own on the first forward
    model.train()
    model.model.vision_tower.eval()
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    kept = model.lm_head.weight
    kept.grad = torch.ones_like(kept)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    facts = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    asked = [(p.requires_grad, p.grad, len(p._post_accumulate_grad_hooks or {})) for p in model.parameters()]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    run(tiny, [tiny.inputs(1)] * 2)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, [tiny.inputs(1)] * 2, progress=interrupt)
    assert [(m.training, len(m._forward_hooks)) for m in model.modules()] == facts
    after = [(p.requires_grad, p.grad, len(p._post_accumulate_grad_hooks or {})) for p in model.parameters()]
    assert all(a[0] == b[0] and a[1] is b[1] and a[2] == b[2] for a, b in zip(asked, after, strict=True))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_weights_the_loss_does_not_reach_score_zero() -> None:
    tiny = tiny_model("llava")  # the features come from the last but one vision block
    tiny.model.config.vision_feature_layer = -1
    groups = find_groups(tiny.model, find_family(tiny.model.config))
    tiny.model.config.vision_feature_layer = -2
    options = UKMI.calibration()
    seen = collect(tiny.model, find_family(tiny.model.config), groups, [tiny.inputs(2)], options)
    assert not seen.seen["first"]["model.vision_tower.encoder.layers.2.mlp.fc1:0"].any()
    assert seen.seen["first"]["model.vision_tower.encoder.layers.1.mlp.fc1:0"].all()


def test_a_loss_that_is_not_finite_names_the_batch() -> None:
    tiny = tiny_model("llava")
    bad = tiny.inputs(1)
    bad["pixel_values"][0, 0, 0, 0] = float("inf")
    with pytest.raises(CalibrationError, match=r"the loss is not finite in calibration batch 2 of 3"):
        run(tiny, [tiny.inputs(1), bad, tiny.inputs(1)], CRITERIA["taylor"])


def test_activations_that_are_not_finite_name_the_linear() -> None:
    tiny = tiny_model("llava")
    bad = tiny.inputs(1)
    bad["pixel_values"][0, 0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"activations of model\.language_model\.layers\.0\.self_attn\.q_proj"):
        run(tiny, [bad])


@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_a_gradient_that_is_not_finite_names_batch_and_tensor(criterion: str) -> None:
    tiny = tiny_model("llava")
    down = tiny.model.get_submodule("model.language_model.layers.1.mlp.down_proj")

    def spoil(_: object, __: object, output: torch.Tensor) -> None:
        if output.shape[0] == 2:
            output.register_hook(lambda grad: grad * float("inf"))

    handle = down.register_forward_hook(spoil)
    with pytest.raises(
        CalibrationError, match=r"layers\.1\.mlp\.down_proj\.weight is not finite in calibration batch 3"
    ):
        run(tiny, [tiny.inputs(1), tiny.inputs(1), tiny.inputs(2)], CRITERIA[criterion])
    handle.remove()


def test_samples_without_an_answer_are_skipped_and_counted() -> None:
    tiny, samples = tiny_model("llava"), uneven_samples("llava")
    silent = {**samples[1], "labels": torch.full_like(samples[1]["labels"], -100)}
    mixed = run(tiny, [padded([samples[0], silent, samples[2]]), silent])
    clean = run(tiny, [padded([samples[0], samples[2]])])
    assert (mixed.samples, mixed.skipped) == (2, 2)
    assert mixed.image_tokens == clean.image_tokens and mixed.text_tokens == clean.text_tokens
    assert_same(mixed, clean)


def test_nothing_to_learn_from_is_refused() -> None:
    tiny = tiny_model("llava")
    silent = tiny.inputs(2)
    silent["labels"] = torch.full_like(silent["labels"], -100)
    with pytest.raises(CalibrationError, match="no calibration batches"):
        run(tiny, [])
    with pytest.raises(CalibrationError, match="none of the 2 calibration samples can count"):
        run(tiny, [silent])
    with pytest.raises(ValueError, match="no labels"):
        run(tiny, [{key: value for key, value in tiny.inputs(1).items() if key != "labels"}])
    with pytest.raises(ValueError, match="one sum of weights' gradients"):
        CalibrationOptions(("first", "fisher"))
    with pytest.raises(ValueError, match="no statistic is wanted"):
        run(tiny, [tiny.inputs(1)], CRITERIA["magnitude"])


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_single_left_over_pair_is_skipped_because_it_has_no_contrast(name: str) -> None:
    tiny = tiny_model(name)
    seen = run(tiny, [tiny.inputs(2), tiny.inputs(1)])
    assert (seen.samples, seen.skipped) == (2, 1)


def test_batches_can_be_made_lazily() -> None:
    tiny = tiny_model("llava")
    made = []

    def make(index: int) -> dict[str, torch.Tensor]:
        made.append(index)
        return tiny.inputs(1 + index)

    seen = run(tiny, [partial(make, 0), partial(make, 1)])
    assert made == [0, 1] and seen.samples == 3
