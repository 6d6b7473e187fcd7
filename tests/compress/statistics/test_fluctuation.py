"""The variance of what output projections read, over every family's tokens."""

import pytest
import torch
from tiny_models import FACTORIES, tiny_model

from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.statistics.collect import collect
from slimvlm.compress.statistics.collector import Side
from slimvlm.compress.statistics.rows import STATISTICS, CalibrationOptions


@pytest.mark.parametrize("name", FACTORIES)
def test_it_is_the_variance_over_all_tokens_that_an_output_projection_reads(name):
    tiny = tiny_model(name)
    family = find_family(tiny.model.config)
    groups, heard = find_groups(tiny.model, family), {}
    outputs = [member.path for group in groups for member in group.members if member.dim == 1]
    handles = [
        tiny.model.get_submodule(path).register_forward_pre_hook(
            lambda _, inputs, path=path: heard.setdefault(path, []).append(inputs[0].detach().flatten(0, -2))
        )
        for path in outputs
    ]
    batches = [tiny.inputs(2), tiny.inputs(3)]
    found = collect(tiny.model, family, groups, batches, CalibrationOptions(("fluctuation",))).seen["fluctuation"]
    for handle in handles:
        handle.remove()
    assert set(found) == set(outputs)
    for path, read in heard.items():
        torch.testing.assert_close(found[path], torch.cat(read).double().var(0).float(), rtol=1e-4, atol=1e-7)


def test_a_mean_far_from_zero_costs_no_variance():
    linear, fluctuation = torch.nn.Linear(2, 1), STATISTICS["fluctuation"].make()
    tokens = torch.randn(4, 50, 2, generator=torch.Generator().manual_seed(0)) + torch.tensor([0, 3000.0])
    with fluctuation.watch([Side("linear", linear, (1,))]):
        for batch in tokens:
            linear(batch)
        found = fluctuation.finish(lambda tensor, how: None)["linear"]
    torch.testing.assert_close(found, tokens.double().flatten(0, 1).var(0).float(), rtol=1e-3, atol=0)
