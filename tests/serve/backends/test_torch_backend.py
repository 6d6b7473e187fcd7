"""The loop that is timed says what `generate` says."""

from __future__ import annotations

import pytest
import torch
from outputs import sure_tokens
from tiny_models import FACTORIES, tiny_model
from transformers import GenerationConfig

from slimvlm.compress.evaluation.evaluate import GREEDY
from slimvlm.compress.models.families import find_family
from slimvlm.serve.backends.backend import HostClock, time_embedding, time_generation
from slimvlm.serve.backends.torch_backend import TorchBackend

DUAL = ("clip", "siglip")
TALKING = sorted(set(FACTORIES) - set(DUAL))
NEW = 6


def prompt_of(tiny, rows=2):
    batch = tiny.inputs(rows)
    batch.pop("labels", None)
    return batch


def backend_of(name):
    tiny = tiny_model(name, "sdpa")
    return tiny, TorchBackend(tiny.model, find_family(tiny.model.config))


def generated(model, batch):
    """The new tokens of `generate`, which may not stop early."""
    config = GenerationConfig(
        **{**GREEDY, "min_new_tokens": NEW}, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0
    )
    ids = sure_tokens(model, batch, generation_config=config)
    return ids[:, -NEW:]


@pytest.mark.parametrize("name", TALKING)
def test_the_timed_loop_generates_the_tokens_of_generate(name):
    tiny, backend = backend_of(name)
    batch = prompt_of(tiny)
    backend.place({key: value.numpy() for key, value in batch.items()})
    timed = time_generation(backend, HostClock(), NEW)
    assert torch.equal(timed.tokens, generated(tiny.model, batch))
    assert set(timed.seconds) == {"vision", "prefill", "ttft", "tpot", "end_to_end"}
    again = time_generation(backend, HostClock(), NEW)
    assert torch.equal(again.tokens, timed.tokens)


@pytest.mark.parametrize("name", TALKING)
def test_the_language_model_runs_without_images(name):
    _, backend = backend_of(name)
    ids = torch.arange(3, 10).expand(2, -1).contiguous()
    backend.place({"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()})
    timed = time_generation(backend, HostClock(), NEW, images=False)
    assert timed.tokens.shape == (2, NEW)
    assert "vision" not in timed.seconds


@pytest.mark.parametrize("name", DUAL)
def test_a_dual_encoder_has_a_vision_and_a_text_phase(name):
    tiny, backend = backend_of(name)
    backend.place({key: value.numpy() for key, value in tiny.inputs(3).items()})
    assert set(time_embedding(backend, HostClock())) == {"vision", "text"}
    assert len(backend.vision().pooler_output) == len(backend.text().pooler_output) == 3
