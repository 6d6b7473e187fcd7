"""What a compression of a model takes on the machine at hand and on known ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from slimvlm.serve.costing.anatomy import anatomy_of
from slimvlm.serve.costing.asked import Asked
from slimvlm.serve.costing.cost import Cost, cost_of
from slimvlm.serve.costing.machines import HERE, MACHINES, machine_named
from slimvlm.serve.costing.probe import measure_machine


@dataclass(frozen=True, slots=True)
class Costs:
    """What was asked, and by machine what it takes."""

    asked: Asked
    image_side: int
    costs: tuple[Cost, ...]

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types."""
        costs = [{**asdict(cost), "disk_bytes": cost.disk_bytes} for cost in self.costs]
        return {"asked": asdict(self.asked), "image_side": self.image_side, "machines": costs}


def costs_of(
    name: str, asked: Asked, machines: Sequence[str] = (), side: int | None = None, trust_remote_code: bool = False
) -> Costs:
    """Of the checkpoint `name`, from its config.

    Args:
        machines: of MACHINES, or `cpu` for the one at hand, which is measured; none: all of them.
        side: of images, in pixels; default: the config's.

    Raises:
        CheckpointError, UnsupportedModelError: no config, or no row for its model type.
        UnsuitableOptionError: an unknown machine.
    """
    anatomy = anatomy_of(name, side, trust_remote_code)
    known = {wanted: machine_named(wanted) for wanted in machines or MACHINES if wanted not in HERE}
    wanted = machines or ("cpu", *MACHINES)
    found = (known[one] if one in known else measure_machine(anatomy.dtype) for one in wanted)
    return Costs(asked, anatomy.side, tuple(cost_of(anatomy, asked, machine) for machine in found))
