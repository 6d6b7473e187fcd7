"""The teacher's outputs on disk: the same loss again, and nothing that goes wrong with the disk stops a run."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from plans import random_plan
from safetensors import safe_open
from tiny_models import tiny_model

from slimvlm.compress.models.families import find_family
from slimvlm.compress.recovery.distillation.distiller import Distiller
from slimvlm.compress.recovery.distillation.recipe import make_stages, parse_recipe
from slimvlm.compress.recovery.distillation.teacher_cache import TeacherCache, batch_key
from slimvlm.compress.slicing.apply import apply_plan

PLENTY = 2**30


def values(*names: str, dtype: torch.dtype = torch.float32, size: int = 100) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(size, generator=generator).to(dtype) for name in names}


def same(found: dict[str, torch.Tensor] | None, expected: dict[str, torch.Tensor]) -> bool:
    return found is not None and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in expected.items()
    )


def files(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_cached_outputs_give_the_loss_of_the_teacher_in_every_stage(tmp_path):
    tiny = tiny_model("llava")
    family = find_family(tiny.model.config)
    student = apply_plan(copy.deepcopy(tiny.model), random_plan(tiny.model, seed=1))
    for recipe in (parse_recipe("lpd"), parse_recipe("sft+kl+rkl+hidden")):
        distiller = Distiller(student, tiny.model, family, recipe).eval()
        for stage in make_stages(family, distiller.depths, recipe):
            cache = TeacherCache(tmp_path, PLENTY)
            names = distiller.target_names(stage)
            losses, missed = [], 0
            for _ in range(3):
                for size in (2, 3):
                    batch = tiny.inputs(size)
                    ask = partial(distiller.targets, batch, stage)
                    missed += cache.get(batch_key("teacher", str(size)), names) is None
                    targets = cache.outputs(batch_key("teacher", str(size)), names, ask)
                    assert set(targets) >= set(names)
                    losses.append(distiller(batch, stage, targets)[0].item())
            assert missed <= 2
            assert losses[:2] == losses[2:4] == losses[4:]
            assert losses[0] == distiller(tiny.inputs(2), stage)[0].item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_put_comes_back_bit_by_bit_in_its_dtype_also_to_another_process_s_cache(tmp_path, dtype):
    kept = values("logits", "vision.1", dtype=dtype)
    assert TeacherCache(tmp_path, PLENTY).put("a", kept)
    assert same(TeacherCache(tmp_path, PLENTY).get("a", ("vision.1", "logits")), kept)


def test_tensors_that_are_views_empty_or_need_gradients_are_kept(tmp_path):
    cache = TeacherCache(tmp_path, PLENTY)
    kept = {"view": torch.arange(12.0).view(3, 4).T, "empty": torch.zeros(0, 5), "grad": torch.ones(2).requires_grad_()}
    assert cache.put("a", kept)
    assert same(cache.get("a", kept), {name: value.detach() for name, value in kept.items()})


def test_a_stage_that_needs_less_reads_its_part_and_one_that_needs_more_adds_what_is_missing(tmp_path):
    cache = TeacherCache(tmp_path, PLENTY)
    shallow, full = values("vision.1", "vision.3"), values("vision.1", "vision.3", "vision.5", "logits")
    cache.put("a", shallow)
    assert same(cache.get("a", ["vision.3"]), {"vision.3": shallow["vision.3"]})
    assert cache.get("a", full) is None
    cache.put("a", full)
    assert files(tmp_path) == ["a.0.safetensors", "a.1.safetensors"]
    with safe_open(tmp_path / "a.1.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["logits", "vision.5"]
    assert same(cache.get("a", full), full)
    assert cache.put("a", full)
    assert len(files(tmp_path)) == 2
    assert cache.get("b", full) is None


@pytest.mark.parametrize("damage", ["cut", "bytes", "empty", "header"])
def test_a_damaged_file_is_a_miss_and_is_replaced(tmp_path, damage):
    cache, kept = TeacherCache(tmp_path, PLENTY), values("logits")
    cache.put("a", kept)
    path = tmp_path / "a.0.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "bytes":
        content[-5] ^= 1
    elif damage == "header":
        content[12] ^= 255
    path.write_bytes({"cut": content[:-7], "empty": b""}.get(damage, content))
    assert cache.get("a", ["logits"]) is None
    cache.put("a", kept)
    assert same(cache.get("a", ["logits"]), kept)
    assert files(tmp_path) == ["a.0.safetensors"]


@pytest.mark.parametrize("budget", [5000, 4700, 6001])
def test_the_folder_stays_within_its_budget_and_says_so_once(tmp_path, budget):
    cache = TeacherCache(tmp_path, budget)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        kept = [cache.put(f"k{index}", values("logits", size=256)) for index in range(20)]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= budget
    assert kept == sorted(kept, reverse=True)
    assert 3 <= sum(kept) < 20
    assert len(said) == 1
    assert f"its budget of {budget} bytes is spent" in str(said[0].message)
    assert cache.size_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert same(cache.get("k0", ["logits"]), values("logits", size=256))
    again = TeacherCache(tmp_path, budget)
    assert again.size_bytes == cache.size_bytes


def test_what_a_killed_process_left_half_written_is_no_hit(tmp_path):
    (tmp_path / ".a.0.safetensors.partial").write_bytes(b"half")
    cache = TeacherCache(tmp_path, PLENTY)
    assert cache.get("a", ["logits"]) is None
    assert cache.put("a", values("logits"))
    assert files(tmp_path) == ["a.0.safetensors"]


FULL_DISK = """
import resource, sys, warnings
from pathlib import Path
import torch
from slimvlm.compress.recovery.distillation.teacher_cache import TeacherCache

folder = Path(sys.argv[1])
cache = TeacherCache(folder, 2**30)
small, large = {"logits": torch.ones(100)}, {"logits": torch.ones(100_000)}
assert cache.put("small", small)
resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, 65_536))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for key in ("a", "b"):
        assert torch.equal(cache.outputs(key, ["logits"], lambda: large)["logits"], large["logits"])
assert len(said) == 1, said
assert torch.equal(cache.get("small", ["logits"])["logits"], small["logits"])
print(sorted(path.name for path in folder.iterdir()))
"""


def test_a_disk_that_takes_no_more_costs_the_cache_and_not_the_run(tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['small.0.safetensors']"


def test_a_folder_that_cannot_be_made_costs_the_cache_and_not_the_run(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(UserWarning, match="takes no more of the teacher's outputs"):
        cache = TeacherCache(tmp_path / "file" / "cache", PLENTY)
    kept = values("logits")
    assert same(cache.outputs("a", ["logits"], lambda: kept), kept)
    assert cache.get("a", ["logits"]) is None


def test_keys_differ_with_every_part_and_its_place():
    keys = {batch_key(*parts) for parts in (("a", "b"), ("b", "a"), ("ab",), ("a", "b", ""), ("a,b",))}
    assert len(keys) == 5
    assert batch_key("a", "b") == batch_key("a", "b")
