"""What torch says on real samples: the answers and graph outputs that every exported variant is held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any  # whatever a run gives

import numpy as np
import torch
from PIL import Image

from slimvlm.compress.data.collate import Batch, Collator
from slimvlm.compress.data.images import as_png
from slimvlm.compress.data.records import Turn
from slimvlm.compress.data.samples import Sample, batches, load_samples, resized
from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.evaluation.evaluate import end_ids, pad_id
from slimvlm.compress.evaluation.quality import exact_match
from slimvlm.compress.models.families import Family
from slimvlm.compress.models.streaming.lazy import read_in
from slimvlm.compress.models.streaming.weights import streamed
from slimvlm.compress.streaming.forwards import through_blocks
from slimvlm.export.checks.answers import Answers, forced_answers, long_sample, retell, shares, torch_answers
from slimvlm.export.checks.parity import Case, TokenCheck
from slimvlm.export.graphs.graph import Graph, Model
from slimvlm.export.graphs.windows import widest_window
from slimvlm.export.options import ExportOptions
from slimvlm.export.running.generation import (
    Arrays,
    PortInfo,
    Prompting,
    Runner,
    generate,
    token_losses,
    until_end,
)
from slimvlm.export.running.names import VISION
from slimvlm.export.running.runners import Opened, Recorder, TorchRunner

ROWS = 4  # samples generated for at once, left-padded
QUESTIONS = ("What is in the image?", "What colour is it?", "How many are there?", "Describe the image.")
Runs = Sequence[Callable[[], Any]]
DEFAULT_SIDE = 448  # of images for families that take any size, where no size was asked for


@dataclass(frozen=True, slots=True)
class Reference:
    """The samples, the cases of every graph, and torch's answers of at most `most` tokens; none of dual encoders.

    Attributes:
        answers: batch by batch, last of all to one long prompt, which is not one of the samples.
        window: of the widest that the language model attends through, in tokens, or 0.
        tokens: torch's own choices in the answers to the samples, up to their end; `accuracy`: how many are right.
        forced: answers are given to torch, which was read block by block.
        first: the batch that is stored beside the files, with what torch gives for it.
    """

    collator: Collator
    most: int
    samples: Sequence[Sample]
    cases: Sequence[Case]
    prompting: Prompting | None
    answers: Sequence[Answers]
    window: int
    tokens: Sequence[Sequence[int]]
    accuracy: float | None
    first: Arrays
    expected: Arrays
    forced: bool = False


def export_samples(collator: Collator, model: Model, options: ExportOptions) -> list[Sample]:
    """The samples of `options.data`, or generated ones; resized where the vision graph has one fixed grid.

    Raises:
        UnsuitableOptionError: an image size that the vision tower cannot take.
        SampleError: the data cannot be read.
    """
    if options.data is not None:
        samples = list(load_samples(options.data, limit=options.samples, seed=options.seed).samples)
        samples = [replace(sample, turns=sample.turns[:1]) for sample in samples]
    else:
        samples = [generated_sample(index, options.seed) for index in range(options.samples)]
    size = image_size(collator, model.config, options)
    return samples if size is None else [resized(sample, size) for sample in samples]


def image_size(collator: Collator, config: Model, options: ExportOptions) -> tuple[int, int] | None:
    """Height and width all images are brought to, or None where the processor brings every image to one size.

    Raises:
        UnsuitableOptionError: a size was asked for that the vision tower cannot take.
    """
    vision, asked = getattr(config, "vision_config", config), options.image_size
    kind = collator.family.export.vision
    own = getattr(vision, "image_size", None)
    own = tuple(own) if isinstance(own, list | tuple) else (own, own)
    if kind in ("patches", "single"):
        patch = getattr(vision, "patch_size", 8)
        merge = getattr(vision, "spatial_merge_size", getattr(config, "spatial_merge_size", 2))
        unit = (patch if isinstance(patch, int) else max(patch)) * merge
        size = asked or (_rounded(DEFAULT_SIDE, unit), _rounded(DEFAULT_SIDE, unit))
        if any(side % unit for side in size):
            near = (_rounded(size[0], unit), _rounded(size[1], unit))
            raise UnsuitableOptionError(
                f"--image-size {_shown(size)}: this tower takes multiples of {unit}; use {_shown(near)}"
            )
        return size
    if kind == "tiles":
        return asked or _whole_tiles(config.image_grid_pinpoints)
    if asked is not None and asked != own:
        raise UnsuitableOptionError(
            f"--image-size {_shown(asked)}: this tower takes {_shown(own)} only; leave the option out"
        )
    return None


def _whole_tiles(pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The smallest size of the model's list, of the square ones if there are any: such images are not padded."""
    height, width = min(pinpoints, key=lambda size: (size[0] != size[1], size[0] * size[1]))
    return height, width


def _rounded(side: int, unit: int) -> int:
    return max(unit, round(side / unit) * unit)


def _shown(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def generated_sample(index: int, seed: int) -> Sample:
    """A picture of a few coloured blocks, and a question about it; there is no right answer."""
    random = np.random.default_rng((seed, index))
    blocks = random.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    image = Image.fromarray(blocks).resize((128, 96), Image.Resampling.BICUBIC)
    turn = Turn(QUESTIONS[index % len(QUESTIONS)], ("",))
    return Sample(Path(f"generated-{index}.png"), (turn,), f"generated sample {index}", content=as_png(image))


def first_batch(collator: Collator, samples: Sequence[Sample]) -> Batch:
    """Two samples as the graphs are traced with."""
    two = (list(samples) * 2)[:2]
    return collator.training(two) if collator.family.contrastive else collator.prompts(two)


def torch_runner(graphs: Sequence[Graph]) -> TorchRunner:
    """The modules that are exported, as they are in torch."""
    return TorchRunner(
        {graph.name: graph.module for graph in graphs},
        {graph.name: graph_ports(graph) for graph in graphs},
        {graph.name: tuple(graph.outputs) for graph in graphs},
    )


def graph_ports(graph: Graph) -> tuple[PortInfo, ...]:
    """Inputs of a graph as every runtime states them."""
    return tuple(port_of(port.name, port.sample, port.axes) for port in graph.inputs)


def port_of(name: str, value: torch.Tensor | np.ndarray, axes: Mapping[int, str]) -> PortInfo:
    """What takes or gives values like this one; `axes` vary, by name."""
    shape = tuple(axes.get(axis, size) for axis, size in enumerate(value.shape))
    return PortInfo(name, str(value.dtype).removeprefix("torch."), shape)


def make_reference(
    model: Model,
    collator: Collator,
    graphs: Sequence[Graph],
    samples: Sequence[Sample],
    most: int,
    before: Sequence[Callable[[], object]] = (),
) -> Reference:
    """Runs torch on all samples; the cases are its first two steps on one sample and on several.

    Args:
        most: new tokens per answer.
        before: what else has the model compute; first of all, but where its blocks are read they are read for all.
    """
    runner, together = torch_runner(graphs), partial(_together, model, collator.family)
    if collator.family.contrastive:
        return _embeddings(runner, collator, samples, lambda runs: together([*before, *runs])[len(before) :])
    prompting, forced = prompting_of(model, collator), streamed(model) is not None
    parts = list(batches(samples, ROWS))
    longest = max(collator.prompts(part)["input_ids"].shape[1] for part in parts)
    if prompting.kind == "decoder" and longest + most > collator.max_text_tokens:
        raise UnsuitableOptionError(
            f"--max-new-tokens {most}: after a prompt of {longest} tokens this model takes at most "
            f"{max(0, collator.max_text_tokens - longest)}; ask for fewer, or give shorter --data"
        )
    window = widest_window(model.get_submodule(collator.family.export.text).config)
    asked = [*parts, [long_sample(collator, samples[0], most, window)], samples[-1:]]
    answering = [partial(_answer, model, collator, part, prompting, most) for part in asked]
    traced = [partial(_as_traced, runner, graph) for graph in graphs]
    single, pair = (_arrays(collator.prompts(part)) for part in (samples[-1:], (list(samples) * 2)[:2]))
    recorded = [("two samples", pair, Recorder(runner)), ("one sample", single, Recorder(runner))]
    generating = [partial(generate, recorder, prompting, batch, 2) for _, batch, recorder in recorded]
    found = iter(together([*before, *answering, *traced, *generating])[len(before) :])
    *answers, stored = islice(found, len(answering))
    cases = list(islice(found, len(traced)))
    merging: list[Callable[[], Any]] = []
    for what, batch, recorder in recorded:
        cases += [Case(graph, what, feeds, outputs) for graph, feeds, outputs in recorder.calls]
        if "embedding" in runner.modules:  # only onnxruntime-genai runs it
            merging += _merging(runner, prompting, what, batch, recorder)
    if merging:
        with read_in(model.get_input_embeddings(), torch.device("cpu")):
            cases += [run() for run in merging]
    tokens = [row for one in answers[:-1] for row in one.chosen(prompting.end)]
    texts = [collator.decode(torch.tensor([until_end(row, prompting.end)]))[0] for row in tokens]
    accuracy = _right(texts, samples) if any(sample.turns[-1].target for sample in samples) else None
    [chosen] = stored.chosen(prompting.end)
    losses = token_losses(stored.logits[0, : len(chosen)], stored.tokens[0, : len(chosen)])
    expected = {"tokens": stored.tokens, "first_logits": stored.logits[:, 0], "losses": losses}
    if forced:
        expected["chosen"] = np.array([chosen])
    known = single, expected, forced
    return Reference(collator, most, samples, cases, prompting, answers, window, tokens, accuracy, *known)


def _together(model: Model, family: Family, runs: Runs) -> list[Any]:
    """What each of them gives; of a model whose blocks are read they go through a block together."""
    if streamed(model) is None:
        return [run() for run in runs]
    with torch.inference_mode():
        return through_blocks(model, family, runs, again=True)


def _answer(model: Model, collator: Collator, samples: Sequence[Sample], prompting: Prompting, most: int) -> Answers:
    if streamed(model) is not None:
        return forced_answers(model, collator, samples, prompting, most)
    return torch_answers(model, collator, _arrays(collator.prompts(samples)), prompting, most)


def _merging(runner: TorchRunner, prompting: Prompting, what: str, batch: Arrays, recorder: Recorder) -> Runs:
    """Image features among the embeddings of a prompt, and beside a token that only looks like an image's."""
    features = next(one["image_features"] for graph, _, one in recorder.calls if graph == VISION)
    feeds = {"input_ids": batch["input_ids"], "image_features": features}
    token = np.full((len(batch["input_ids"]), 1), prompting.image_token)
    given = {"input_ids": token, "image_features": features[:0]}
    both = (what, feeds), (f"{what}, an image token given by the model", given)
    return [partial(_case, runner, "embedding", case, fed) for case, fed in both]


def prompting_of(model: Model, collator: Collator) -> Prompting:
    """What a client has to know of this model, from its config and tokenizer."""
    row, text = collator.family.export, getattr(model.config, "text_config", model.config)
    return Prompting(
        kind=collator.family.kind,
        image_token=int(collator.image_token_id),
        end=end_ids(model, collator),
        pad=pad_id(model, collator),
        positions=row.positions,
        first_position=row.first_position,
        merge=getattr(model.config.vision_config, "spatial_merge_size", 1) if row.positions == "mrope" else 1,
        start=text.decoder_start_token_id if collator.family.own_decoder else None,
    )


def check_tokens(runner: Opened, reference: Reference) -> TokenCheck:
    """Torch's answers retold by a runtime, on all samples in left-padded batches and on one long prompt."""
    prompting = reference.prompting
    if prompting is None:
        raise ValueError("a dual encoder gives no tokens to check")
    retold = runner.together([partial(retell, runner, prompting, answers, "answers") for answers in reference.answers])
    *asked, _ = retold
    choices = [row for one in asked for row in one.choices]
    equal, share = shares(choices, reference.tokens)
    worst = [one.difference for one in retold]
    return TokenCheck(
        samples=len(reference.tokens),
        equal=equal,
        token_share=share,
        loss=float(np.concatenate([row for one in asked for row in one.losses]).mean()),
        torch_loss=float(np.concatenate([row for one in asked for row in one.torch_losses]).mean()),
        divergence=float(np.concatenate([row for one in asked for row in one.divergences]).mean()),
        max_relative=max(one.max_relative for one in worst),
        cosine=min(one.cosine for one in worst),
        long_prompt=reference.answers[-1].prompts["input_ids"].shape[1],
        window=reference.window,
        accuracy=_accuracy(runner, reference, equal, choices),
        torch_accuracy=reference.accuracy,
        forced=reference.forced,
    )


def _accuracy(runner: Runner, reference: Reference, equal: int, choices: Sequence[Sequence[int]]) -> float | None:
    """Right answers of a runtime's own tokens, which are its choices where answers are forced; those of torch where
    all are equal.
    """
    prompting = reference.prompting
    if prompting is None or reference.accuracy is None or equal == len(reference.tokens):
        return reference.accuracy
    found = choices
    if not reference.forced:
        prompts = (answers.prompts for answers in reference.answers[:-1])
        found = [row for one in prompts for row in generate(runner, prompting, one, reference.most).tokens]
    texts = [reference.collator.decode(torch.tensor([until_end(row, prompting.end)]))[0] for row in found]
    return _right(texts, reference.samples)


def _right(texts: Sequence[str], samples: Sequence[Sample]) -> float:
    right = [exact_match(text, sample.turns[-1].answers) for text, sample in zip(texts, samples, strict=True)]
    return sum(right) / len(right)


def _embeddings(
    runner: TorchRunner, collator: Collator, samples: Sequence[Sample], together: Callable[[Runs], list[Any]]
) -> Reference:
    parts = {f"{len(samples)} samples": collator.training(samples), "one sample": collator.training(samples[-1:])}
    asked = []
    for what, batch in parts.items():
        arrays = _arrays(batch)
        for graph in runner.modules:
            feeds = {port.name: arrays[port.name] for port in runner.inputs(graph)}
            if "input_ids" in feeds:  # another length, also where the processor pads every text to one
                shorter = {name: array[:, :-1] for name, array in feeds.items()}
                asked.append(partial(_case, runner, graph, f"{what}, a token less", shorter))
            asked.append(partial(_case, runner, graph, what, feeds))
    cases = together(asked)
    first = _arrays(parts["one sample"])
    last = [case for case in cases if case.what == "one sample"]
    expected = {f"{case.graph}.{name}": array for case in last for name, array in case.outputs.items()}
    return Reference(collator, 0, samples, cases, None, [], 0, [], None, first, expected)


def _as_traced(runner: TorchRunner, graph: Graph) -> Case:
    """What the graph was traced with: several new tokens on a cache that is not empty."""
    return _case(runner, graph.name, "as traced", {port.name: port.sample.numpy() for port in graph.inputs})


def _case(runner: TorchRunner, graph: str, what: str, feeds: Arrays) -> Case:
    return Case(graph, what, feeds, runner.run(graph, feeds))


def _arrays(batch: Mapping[str, torch.Tensor]) -> Arrays:
    return {name: tensor.numpy() for name, tensor in batch.items() if name != "return_loss"}
