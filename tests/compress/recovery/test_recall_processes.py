"""Weight recalling when a model is sharded over two processes (FSDP2): the gradients of one, slices sharded as well."""

from __future__ import annotations

import torch
from pairs import assert_done, run_pair
from recalled import SMALL, make_case, randomise, trainable
from safetensors.torch import load_file

WORKER = """
import os, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from recalled import make_case, randomise, trainable

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
torch.set_num_threads(1)
case = make_case(folder / str(rank))
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
adapted = randomise(case.attach())
mesh = init_device_mesh("cpu", (2,))
for block in (*case.model.model.language_model.layers, *case.model.model.vision_tower.encoder.layers):
    fully_shard(block, mesh=mesh)
fully_shard(adapted, mesh=mesh)
adapted(**case.tiny.inputs(2)).loss.backward()
gradients = {name: weight.grad.full_tensor() for name, weight in trainable(adapted).items() if weight.grad is not None}
slices = [weight for name, weight in adapted.named_parameters() if name.endswith(("recalled_rows", "recalled_columns"))]
gradients["share"] = torch.tensor(sum(w.to_local().numel() for w in slices) / sum(w.numel() for w in slices))
if rank == 0:
    save_file(gradients, folder / "gradients.safetensors")
distributed.barrier()
distributed.destroy_process_group()
"""


def test_two_processes_that_share_the_model_find_the_gradients_of_one(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    assert_done(run_pair(tmp_path, [tmp_path / "worker.py", tmp_path]))
    found = load_file(tmp_path / "gradients.safetensors")
    assert 0.3 < found.pop("share").item() < 0.7
    case = make_case(tmp_path / "alone")
    adapted = randomise(case.attach(SMALL))
    adapted(**case.tiny.inputs(2)).loss.backward()
    expected = {name: weight.grad for name, weight in trainable(adapted).items() if weight.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)
