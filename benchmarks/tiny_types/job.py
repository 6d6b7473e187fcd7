"""The job on one model type, stage by stage: a record says how far it comes and why not further."""

from __future__ import annotations

import copy
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as TYPES

from tiny_types.facts import FACTS, PLAIN, REASONS
from tiny_types.shrinking import IMAGE_TOKEN, tiny_config
from tiny_types.standing_in import TYPED, StandIn

from exports import tiny_samples  # isort: skip  (of tests/support, which standing_in.py adds to the path)
from plans import make_plan

from slimvlm.compress.data.collate import Collator
from slimvlm.compress.errors import SlimvlmError
from slimvlm.compress.evaluation.evaluate import evaluate
from slimvlm.compress.models.checkpoint import load_model
from slimvlm.compress.models.experts import take_apart
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import Group, find_groups
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.compress.slicing.mask import mask_plan
from slimvlm.export.job import export_model
from slimvlm.export.options import ExportOptions

STAGES = ("build", "forward", "inspect", "cut", "reload", "evaluate", "export")
ROUNDING = 1e-4  # relative to the largest logit: masked against cut, fp32
Record = dict[str, Any]


class NotEqualError(Exception):
    """Two models that should compute the same do not."""


class Job:
    """One model type; every stage uses what the earlier ones left."""

    def __init__(self, model_type: str, folder: Path) -> None:
        self.type, self.folder, self.facts = model_type, folder, FACTS.get(model_type, PLAIN)
        self.record: Record = {"type": model_type, "class": TYPES[model_type], "stages": {}}

    def run(self, until: str = STAGES[-1]) -> Record:
        """The record; it ends with the first stage that fails."""
        for stage in STAGES[: STAGES.index(until) + 1]:
            step: Callable[[], None] = getattr(self, stage)
            try:
                step()
            except Exception as error:
                self.record["stages"][stage] = said(error).replace(str(self.folder), "the folder")
                self.record["why"] = REASONS.get(self.type) or self.refusal() or self.record["stages"][stage]
                break
            self.record["stages"][stage] = "ok"
        return self.record

    def refusal(self) -> str | None:
        """Slimvlm's own, of which a tiny model that cannot be built tells nothing."""
        try:
            find_family(transformers.CONFIG_MAPPING[self.type]())
        except SlimvlmError as error:
            return said(error)
        return None

    def build(self) -> None:
        """A random model of its own class; norms and biases have noise, since zeros hide faults."""
        torch.manual_seed(0)
        self.model = getattr(transformers, TYPES[self.type])(tiny_config(self.type, self.facts.config)).eval()
        with torch.no_grad():
            for weight in self.model.parameters():
                if weight.ndim <= 1:
                    weight.add_(0.1 * torch.randn(weight.shape))
                else:
                    weight.copy_(torch.randn(weight.shape) * (0.5 / weight.shape[-1] ** 0.5))

    def forward(self) -> None:
        """The dense model on an image and a text of a few words."""
        self.processor = StandIn(self.model, self.facts)
        image = self.processor.prepare(torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(1)))
        ids = torch.tensor([[IMAGE_TOKEN] * self.processor.tokens + [5, 6, 7]])
        typed = {name: (ids == IMAGE_TOKEN).long() for name in TYPED if name in self.processor.takes}
        with torch.no_grad():
            out = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), **typed, **image)
        if not bool(out.logits.isfinite().all()):
            raise NotEqualError("its logits are not finite")

    def inspect(self) -> None:
        """Its row, and the groups that the row finds."""
        self.family = find_family(self.model.config)
        take_apart(self.model, self.family)
        groups = find_groups(self.model, self.family)
        self.record["family"] = self.family.name
        self.record["cut"] = sorted({part_of(group) for group in groups})

    def cut(self) -> None:
        """A third of all units leaves: the cut model equals the dense one with those units masked."""
        self.collator = Collator(self.processor, self.family, self.model.config)
        self.batch = self.collator.training(tiny_samples(2))
        plan = make_plan(self.model, thirds)
        masked = mask_plan(copy.deepcopy(self.model), plan)
        self.cut_model, self.plan = apply_plan(copy.deepcopy(self.model), plan), plan
        wanted = logits(masked, self.batch)
        require_equal("the cut model", logits(self.cut_model, self.batch), wanted)
        if torch.equal(wanted, logits(self.model, self.batch)):
            raise NotEqualError("the cut changes nothing: the batch does not reach what is cut")

    def reload(self) -> None:
        """Three ways: slimvlm, transformers with the folder's own code, and the stock class from the stock layout."""
        folder, wanted = self.folder / "per-layer", logits(self.cut_model, self.batch)
        save_checkpoint(folder, self.cut_model, None, self.plan)
        require_equal("slimvlm.load", logits(load_model(folder).model, self.batch), wanted)
        auto = transformers.AutoModelForImageTextToText
        require_equal(
            "from_pretrained", logits(auto.from_pretrained(folder, trust_remote_code=True), self.batch), wanted
        )
        plan = make_plan(self.model, lambda group: thirds(group) if stock_can(group) else range(group.size))
        self.record["stock"] = sorted({part_of(group) for group in self._stock()})
        model = apply_plan(copy.deepcopy(self.model), plan)
        save_checkpoint(self.folder / "stock", model, None, plan, "stock")
        plain = auto.from_pretrained(self.folder / "stock")
        require_equal("the stock class", logits(plain, self.batch), logits(model, self.batch))

    def _stock(self) -> list[Group]:
        return [group for group in find_groups(self.model, self.family) if stock_can(group)]

    def evaluate(self) -> None:
        """Answers and the loss of the right ones."""
        quality = evaluate(self.cut_model, self.collator, tiny_samples(3), batch_size=2)
        self.record["loss"] = round(float(quality.scores["token_loss"]), 4)

    def export(self) -> None:
        """Every graph to ONNX, held against torch: values, and the tokens of whole answers."""
        options = ExportOptions(exporter="torchscript", samples=4, max_new_tokens=5, image_size=self._size()).checked()
        if self.cut_model._supports_sdpa:
            self.cut_model.set_attn_implementation("sdpa")
        export_model(self.cut_model, self.collator, self.folder / "export", options, lambda *_: None, {"family": ""})

    def _size(self) -> tuple[int, int] | None:
        return {"patches": (16, 16), "tiles": (16, 16), "single": (16, 16)}.get(self.family.export.vision)


def part_of(group: Group) -> str:
    """Tower and kind, as `language.attn`."""
    return f"{group.tower}.{group.key.rpartition('.')[2]}"


def thirds(group: Group) -> list[int]:
    """The first two thirds of the units, or fewer, where a width is so many times the block's; of query heads, per KV
    head.
    """
    if group.kind == "mlp" and not group.slots:
        step = group.weights_per_unit // len(group.members) if getattr(group.part, "ratio", False) else 1
        return list(range(max(1, -(-2 * group.size // 3) // step) * step))
    if group.kv_heads == group.size:
        return list(range(group.size - max(1, group.size // 3)))
    per = group.heads_per_kv
    return [kv * per + slot for kv in range(group.kv_heads) for slot in range(max(1, per - max(1, per // 3)))]


def stock_can(group: Group) -> bool:
    """Channels that a field of the config sizes."""
    return group.kind == "mlp" and bool(group.part.fields)


@torch.no_grad()
def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of a batch with labels, in fp32."""
    found: torch.Tensor = model.eval()(**{name: value for name, value in batch.items()}).logits
    return found.float()


def require_equal(what: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Raises NotEqualError beyond rounding."""
    worst = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1))
    if not worst <= ROUNDING:
        raise NotEqualError(f"{what} differs from what it should equal by {worst:.2g} of the largest logit")


def said(error: Exception) -> str:
    """One line; of what is not slimvlm's refusal also where it was raised."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, SlimvlmError | NotEqualError):
        return text
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({Path(last.filename).name}:{last.lineno})"


def work(model_type: str) -> Record:
    """The record of a type, its files in a folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-type-"))
    try:
        return Job(model_type, folder).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
