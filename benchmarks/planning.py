"""Plan 488,304 units (BLIP-2 Flan-T5-XL's shape) and cut half of a 1 GB model; prints seconds, memory and GB/s.

`python benchmarks/planning.py`
"""

from __future__ import annotations

import json
import resource
import time
from typing import Any

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
)

from slimvlm.compress.allocate.budget import Budget, plan_units
from slimvlm.compress.allocate.facts import facts_of
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.criteria.scoring import score_groups
from slimvlm.compress.files.writing import installed_versions
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.plan import Plan
from slimvlm.compress.slicing.apply import apply_plan

REPEATS = 5


def blip2_flan_t5_xl() -> Blip2ForConditionalGeneration:
    """The paper's model without weights (meta device)."""
    vision = {
        "hidden_size": 1408,
        "intermediate_size": 6144,
        "num_hidden_layers": 39,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
    }
    text: dict[str, Any] = {
        "vocab_size": 32128,
        "d_model": 2048,
        "d_kv": 64,
        "d_ff": 5120,
        "num_layers": 24,
        "num_decoder_layers": 24,
        "num_heads": 32,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    }
    with torch.device("meta"):
        return Blip2ForConditionalGeneration(Blip2Config(vision_config=vision, text_config=T5Config(**text)))


def medium_llava() -> LlavaForConditionalGeneration:
    """About 1 GB of fp32 weights, nearly all of them prunable."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=2000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=1999)
    ).eval()


def _plan(model: torch.nn.Module, seed: int) -> tuple[Plan, float]:
    groups = find_groups(model, find_family(model.config))
    scores = score_groups(groups, CRITERIA["random"], None, model, seed)
    started = time.perf_counter()
    plan = plan_units(groups, scores, Budget(ratio=0.5, allocator="balanced"), facts_of(model, groups))
    return plan, time.perf_counter() - started


def copy_speeds() -> tuple[float, float]:
    """Bytes read and written per second by a copy of 512 MB: into memory that was used before, and into fresh memory.

    A cut makes new tensors, so the second is what it competes with: the system hands out and clears new pages.
    """
    source, target = torch.ones(2**27), torch.zeros(2**27)
    used, fresh = 0.0, 0.0
    for _ in range(REPEATS):
        started = time.perf_counter()
        target.copy_(source)
        used = max(used, 2 * source.nbytes / (time.perf_counter() - started))
        started = time.perf_counter()
        source.clone()
        fresh = max(fresh, 2 * source.nbytes / (time.perf_counter() - started))
    return used, fresh


def main() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan, seconds = _plan(blip2_flan_t5_xl(), 0)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    report: dict[str, Any] = {
        "planning": {
            "units": sum(plan.sizes.values()),  # no grouped queries here: every index is a unit
            "seconds": round(seconds, 3),
            "extra_peak_bytes": peak,
            "removed": round(plan.removed_fraction, 6),
        }
    }
    model = medium_llava()
    prunable = sum(group.num_units * group.weights_per_unit for group in find_groups(model, find_family(model.config)))
    plan, _ = _plan(model, 1)
    kept = 4 * (prunable - (plan.parameters_before - plan.parameters_after))
    started = time.perf_counter()
    apply_plan(model, plan)
    seconds = time.perf_counter() - started
    speed = 2 * kept / seconds
    used, fresh = copy_speeds()
    report["cutting"] = {
        "kept_bytes": kept,
        "seconds": round(seconds, 3),
        "read_and_written_gb_per_s": round(speed / 1e9, 2),
        "copy_to_fresh_memory_gb_per_s": round(fresh / 1e9, 2),
        "copy_to_used_memory_gb_per_s": round(used / 1e9, 2),
        "share_of_copy_to_fresh_memory": round(speed / fresh, 2),
        "share_of_copy_to_used_memory": round(speed / used, 2),
    }
    report["threads"] = torch.get_num_threads()
    report["versions"] = installed_versions()
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
