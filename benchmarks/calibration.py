"""What collecting statistics costs against a plain forward + backward over the same samples.

    python benchmarks/calibration.py [--hidden 1024] [--layers 4] [--samples 8] [--batch 2] [--repeats 5]
        [--threads 1] [--device cpu] [--clock wall|cpu]

Builds a random LLaVA of the asked width, interleaves plain passes and `collect` runs and prints medians and ratios.
`--clock cpu` counts the process's CPU time: use it with one thread on a machine that others are using.
`plain` gives gradients to the prunable weights only, as calibration does; `plain, answers only` also skips the logits
that no answer needs, as calibration does; `plain, all weights` is a training step without its optimiser.
Target: `ukmi` <= 1.15 x `plain` at a text hidden size of at least 1024, on a CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import Group, find_groups
from slimvlm.compress.statistics.collect import collect

VOCABULARY, IMAGE_TOKEN = 4096, 4000
IMAGE_SIZE, PATCH, TEXT_TOKENS, ANSWER_TOKENS = 112, 8, 60, 20
PLAIN = "plain"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Batch = dict[str, Tensor]


def make_model(hidden: int, layers: int, device: str) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
    )
    vision = CLIPVisionConfig(
        hidden_size=hidden // 2,
        intermediate_size=hidden * 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    model = LlavaForConditionalGeneration(config).to(device).eval()  # type: ignore[arg-type]  # its wrapper lacks self
    model.set_attn_implementation("eager")
    return model


def make_batches(samples: int, size: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for start in range(0, samples, size):
        count = min(size, samples - start)
        images = torch.full((count, (IMAGE_SIZE // PATCH) ** 2), IMAGE_TOKEN)
        text = torch.randint(3, IMAGE_TOKEN, (count, TEXT_TOKENS), generator=generator)
        ids = torch.cat([images, text], dim=1)
        labels = ids.clone()
        labels[:, :-ANSWER_TOKENS] = -100
        pixels = torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        batches.append(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}
        )
    return batches


def own_loss(model: nn.Module, inputs: Batch) -> Tensor:
    return model(**inputs, use_cache=False).loss


def answer_loss(model: nn.Module, inputs: Batch) -> Tensor:
    targets = inputs["labels"][:, 1:]
    kept = (targets != -100).any(0).nonzero().flatten()
    others = {name: value for name, value in inputs.items() if name != "labels"}
    logits = model(**others, use_cache=False, logits_to_keep=kept).logits
    return functional.cross_entropy(logits.flatten(0, 1), targets[:, kept].flatten())


def plain_pass(
    model: PreTrainedModel, weights: Sequence[nn.Parameter], batches: Sequence[Batch], loss: Callable[..., Tensor]
) -> None:
    """Forward and backward, gradients added up in `weights` only."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    for batch in batches:
        inputs = {name: value.to(model.device, non_blocking=True) for name, value in batch.items()}
        loss(model, inputs).backward()
    for weight in weights:
        weight.grad = None


def candidates(
    model: PreTrainedModel, groups: Sequence[Group], batches: Sequence[Batch]
) -> dict[str, Callable[[], object]]:
    family = find_family(model.config)
    prunable = [model.get_parameter(f"{member.path}.weight") for group in groups for member in group.members]
    runs: dict[str, Callable[[], object]] = {
        PLAIN: lambda: plain_pass(model, prunable, batches, own_loss),
        f"{PLAIN}, all weights": lambda: plain_pass(model, list(model.parameters()), batches, own_loss),
        f"{PLAIN}, answers only": lambda: plain_pass(model, prunable, batches, answer_loss),
    }
    for name in ("ukmi", "taylor", "fisher"):
        options = CRITERIA[name].calibration()
        runs[name] = partial(collect, model, family, groups, batches, options)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("hidden", 1024), ("layers", 4), ("samples", 8), ("batch", 2), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    asked = parser.parse_args()
    clock = CLOCKS[asked.clock]
    torch.set_num_threads(asked.threads)
    model = make_model(asked.hidden, asked.layers, asked.device)
    batches = make_batches(asked.samples, asked.batch)
    runs = candidates(model, find_groups(model, find_family(model.config)), batches)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(asked.repeats + 1):
        for name, call in runs.items():
            start = clock()
            call()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    middle = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first one warms up
    for name, value in middle.items():
        low, high = min(seconds[name][1:]), max(seconds[name][1:])
        print(f"{name:21} {value:8.3f} s  ({low:.3f} to {high:.3f})  {value / middle[PLAIN]:5.2f} x plain")
    setting = vars(asked) | {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }
    print(json.dumps(setting))


if __name__ == "__main__":
    main()
