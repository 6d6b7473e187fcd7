"""Graphs of a streamed model are traced by the sizes of its weights: their values are read when they are written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from slimvlm.compress.models.streaming.lazy import Lazy, places_of


def is_streamed(module: nn.Module) -> bool:
    """Whether weights of the module are read when they are needed."""
    return any(isinstance(parameter, Lazy) for parameter in module.parameters())


@contextmanager
def fake_weights(module: nn.Module) -> Iterator[AbstractContextManager[object]]:
    """Within, weights that are not in memory are fake tensors: the module can be traced.

    Yields:
        Within this, the module also computes: sizes for numbers, or what it always does where no weight is fake.
    """
    owners = places_of(module)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[int, nn.Parameter] = {}
    try:
        for owner, name, parameter in owners:
            if id(parameter) not in fakes:  # a weight of several modules stays one
                with mode:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    fakes[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
            owner._parameters[name] = fakes[id(parameter)]
        yield mode if owners else nullcontext()
    finally:
        for owner, name, parameter in owners:
            owner._parameters[name] = parameter


@torch.no_grad()
def output_shapes(module: nn.Module, inputs: Sequence[Tensor]) -> list[torch.Size]:
    """Of what the module gives for these inputs."""
    with fake_weights(module) as computed, computed:
        results = module(*inputs)
    return [result.shape for result in ((results,) if isinstance(results, Tensor) else results)]
