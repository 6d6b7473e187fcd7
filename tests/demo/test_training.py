"""A training of the demo that was interrupted, and one of a cut's shape."""

import torch

from slimvlm.demo.model import build_model, build_processor
from slimvlm.demo.train import restore_state, save_state


def begun(seed):
    torch.manual_seed(seed)
    model = build_model(build_processor().tokenizer)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def step(model, optimizer):
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.1 * (number % 3)) if number else None  # one is not used
    optimizer.step()


def test_a_training_goes_on_with_the_weights_and_moments_that_it_stopped_with(tmp_path):
    model, optimizer = begun(0)
    assert restore_state(model, optimizer, tmp_path / "state.safetensors") == 0
    step(model, optimizer)
    save_state(model, optimizer, 7, tmp_path / "state.safetensors")
    other, its_optimizer = begun(1)
    assert restore_state(other, its_optimizer, tmp_path / "state.safetensors") == 7
    for one in ((model, optimizer), (other, its_optimizer)):
        step(*one)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
