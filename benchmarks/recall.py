"""What weight recalling costs a training step, against a plain low-rank adapter on the same cut model.

    python benchmarks/recall.py [--hidden 1024] [--layers 2] [--text-tokens 64] [--batch 1] [--repeats 7] [--ratio 0.5]
        [--threads 1] [--device cpu] [--autocast] [--clock wall|cpu]

Cuts a random LLaVA (a CLIP tower and a Llama of the asked width, 576 image tokens), reads the pruned slices from its
saved checkpoint, and times a step (forward, backward, AdamW) of
(a) `recall`: the slices multiplied with the factors once per step, as slimvlm trains,
(b) `plain`: peft's own LoRA of the same rank, alpha and dropout on the same linears,
(c) `literal`: the slices multiplied with every token, as the paper's formula is written.
The three run side by side, in turns; medians and ratios are printed. `--clock cpu` counts the process's CPU time: use
it with one thread on a machine that others are using. Targets at a hidden size of at least 1024: (a) <= 1.25 x (b) and
(c) >= 1.3 x (a).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

from slimvlm.compress.allocate.budget import Budget, plan_units
from slimvlm.compress.allocate.facts import facts_of
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.criteria.scoring import score_groups
from slimvlm.compress.files.writing import installed_versions
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.options import LowRank
from slimvlm.compress.plan import Plan
from slimvlm.compress.recovery.adapters.recall import RecallVariant, attach, recall_layers
from slimvlm.compress.recovery.adapters.slices import Slices
from slimvlm.compress.recovery.adapters.targets import find_targets
from slimvlm.compress.slicing.apply import apply_plan

VOCABULARY, IMAGE_TOKEN = 4096, 4000
IMAGE_SIZE, PATCH, ANSWER_TOKENS = 336, 14, 20
RECALL, PLAIN, LITERAL = "recall", "plain", "literal"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Step = Callable[[], None]


def make_model(hidden: int, layers: int) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
    )
    vision = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config)


def make_batch(size: int, text_tokens: int, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.full((size, (IMAGE_SIZE // PATCH) ** 2), IMAGE_TOKEN)
    ids = torch.cat([images, torch.randint(3, IMAGE_TOKEN, (size, text_tokens), generator=generator)], dim=1)
    labels = ids.clone()
    labels[:, :-ANSWER_TOKENS] = -100
    pixels = torch.randn(size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}
    return {name: value.to(device) for name, value in batch.items()}


def cut_model(model: PreTrainedModel, ratio: float) -> Plan:
    """Cuts random units, the same share of every group, in place."""
    groups = find_groups(model, find_family(model.config))
    scores = score_groups(groups, CRITERIA["random"])
    plan = plan_units(groups, scores, Budget(ratio=ratio, allocator="local"), facts_of(model, groups))
    apply_plan(model, plan)
    return plan


def variants(ratio: float, hidden: int, layers: int, device: str) -> dict[str, nn.Module]:
    """The same cut model with each kind of adapter."""
    model = make_model(hidden, layers)
    with tempfile.TemporaryDirectory() as folder:
        dense = save_checkpoint(Path(folder) / "dense", model, None, None)
        plan = cut_model(model, ratio)
        model.to(device)  # type: ignore[arg-type]  # transformers' wrapper of it lacks self
        slices = Slices(dense, model, plan)
        models: dict[str, nn.Module] = {
            name: attach(copy.deepcopy(model), plan, slices, LowRank()) for name in (RECALL, LITERAL)
        }
    for layer in recall_layers(models[LITERAL]).values():
        layer.lora_variant = dict.fromkeys(layer.lora_variant, Literal())
    defaults = LowRank()
    config = peft.LoraConfig(
        r=defaults.rank,
        lora_alpha=defaults.alpha,  # type: ignore[arg-type]  # peft multiplies by it, nothing asks for an int
        lora_dropout=defaults.dropout,
        target_modules=find_targets(model, plan.attention_unit),
    )
    models[PLAIN] = peft.get_peft_model(model, config)
    return {name: models[name].train() for name in (RECALL, PLAIN, LITERAL)}


class Literal(RecallVariant):
    """The recall branches as the paper's formula is written: every token meets the pruned slices."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        rows, columns = module.slices()
        dropped = module.lora_dropout[active_adapter](x)
        total = module.lora_B[active_adapter](module.lora_A[active_adapter](dropped))
        if active_adapter in module.lora_rows_A:
            seen = functional.linear(x, rows.to(x.dtype))
            total = total + module.lora_rows_B[active_adapter](module.lora_rows_A[active_adapter](seen))
        if active_adapter in module.lora_columns_A:
            spread = module.lora_columns_B[active_adapter](module.lora_columns_A[active_adapter](x))
            total = total + functional.linear(spread, columns.to(x.dtype))
        return result + total * module.scaling[active_adapter]


def make_step(model: nn.Module, batch: dict[str, Tensor], autocast: bool) -> Step:
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
    device = batch["input_ids"].device.type

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("hidden", 1024), ("layers", 2), ("text-tokens", 64), ("batch", 1), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--autocast", action="store_true", help="bf16")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    asked = parser.parse_args()
    clock = CLOCKS[asked.clock]
    torch.set_num_threads(asked.threads)
    batch = make_batch(asked.batch, asked.text_tokens, asked.device)
    models = variants(asked.ratio, asked.hidden, asked.layers, asked.device)
    steps = {name: make_step(model, batch, asked.autocast) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(asked.repeats + 1):
        for name, step in steps.items():
            start = clock()
            step()
            seconds[name].append(clock() - start)
    middle = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first one warms up
    for name, value in middle.items():
        low, high = min(seconds[name][1:]), max(seconds[name][1:])
        trained = sum(weight.numel() for weight in models[name].parameters() if weight.requires_grad)
        print(f"{name:8} {value:8.3f} s  ({low:.3f} to {high:.3f})  {trained:9,d} trained")
    print(f"{RECALL} = {middle[RECALL] / middle[PLAIN]:.2f} x {PLAIN} (target <= 1.25)")
    print(f"{LITERAL} = {middle[LITERAL] / middle[RECALL]:.2f} x {RECALL} (target >= 1.3)")
    print(json.dumps(vars(asked) | {"tokens": batch["input_ids"].numel()} | installed_versions()))


if __name__ == "__main__":
    main()
