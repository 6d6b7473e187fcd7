"""The model card of a folder, `README.md`: the metadata that the Hub reads, and what was done to the model. No torch.

What the text says is also in the metadata, under `slimvlm`, from which it is written anew when more becomes known. Of
the base model's own card the licence, languages and data sets are carried over; its text stays beside ours. A card
never names a path of the machine it was written on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any  # JSON and YAML

from slimvlm.compress.files.decoding import content_of, decode, dump, parse
from slimvlm.compress.files.folders import MANIFEST, FileEntry
from slimvlm.compress.files.writing import file_digest, installed_versions, write_text
from slimvlm.compress.plan import Plan

CARD, BASE_CARD = "README.md", "BASE_MODEL_CARD.md"
TEMPLATE = Path(__file__).with_name("card.md.j2")
OURS = "slimvlm"  # key of the metadata, and tag
CARRIED = ("license", "license_name", "license_link", "language", "datasets")
LONGEST_NAME, MOST_NAMES = 200, 100
LONGEST_METADATA = 2**18  # characters; YAML is read slowly
# A model that lies in the cache of huggingface_hub tells its name on the Hub by its folder.
CACHED = re.compile(r"models--([^-/](?:-?[^-/])*)--((?:-?[^-/])+)/snapshots/[^/]+/?$")
ON_HUB = re.compile(r"[A-Za-z0-9][\w-]*/(?!checkpoint-\d+$)[A-Za-z0-9][\w.-]*")  # not where a trainer leaves its steps


@dataclass(frozen=True, slots=True)
class Change:
    """Parameters before and after the cut."""

    before: int
    after: int

    @property
    def removed(self) -> float:
        """Removed fraction."""
        return 1 - self.after / self.before


@dataclass(frozen=True, slots=True)
class Cut:
    """How units were chosen, and what went: of all parameters, and per tower."""

    ratio: float
    criterion: str
    allocator: str
    rounds: int
    compensation: str
    whole: Change
    towers: Mapping[str, Change]


@dataclass(frozen=True, slots=True)
class Recovered:
    """The training after the cut."""

    recipe: str
    trained: str
    steps: int
    samples: int


@dataclass(frozen=True, slots=True)
class Scored:
    """A figure of the dense and of this model (of one task or of all), 0 to 1, and the interval of the change."""

    task: str
    questions: int
    dense: float
    slim: float
    low: float
    high: float

    @property
    def worse(self) -> bool:
        """Measurably."""
        return self.high < 0


@dataclass(frozen=True, slots=True)
class Measured:
    """Both models on the same questions.

    Attributes:
        data: name of the file or folder with the questions.
        held_out: no image of it was calibrated on.
        metric: what is counted; `level` of the intervals.
        blind: the dense model's figure with images shuffled, where that is known.
        tasks: those that lost most first.
    """

    data: str
    held_out: bool
    images: int
    metric: str
    level: float
    blind: float | None
    whole: Scored
    tasks: tuple[Scored, ...]


@dataclass(frozen=True, slots=True)
class Told:
    """What a card says.

    Attributes:
        base: name of the model that was given, None: this one was not made from another.
        contrastive: it scores pairs of image and text, instead of answering.
        code: loads through code of its own (layout per-layer).
        form: int8 or int4, how torchao holds its linears; `zeros`: share of parameters that were made zero.
        earlier: the base had been cut by slimvlm before; from and to how many parameters.
    """

    base: str | None = None
    contrastive: bool = False
    code: bool = False
    cut: Cut | None = None
    earlier: Change | None = None
    form: str | None = None
    zeros: float | None = None
    recovered: Recovered | None = None
    measured: Measured | None = None
    versions: Mapping[str, str] = field(default_factory=installed_versions)


@dataclass(frozen=True, slots=True)
class Card:
    """A card of ours: `carried` are the other keys of its metadata that outlive it."""

    told: Told
    carried: Mapping[str, Any]


def _origin(source: Path | None, folder: Path) -> Card:
    """What the model in the folder `source` says of itself, for the card of what is made of it: its name as `base`, the
    metadata to carry over, and, if slimvlm made it, what was done to it. The text of its authors goes to `folder`.
    """
    if source is None or not source.is_dir():
        return Card(Told(), {})
    _carry_text(source, folder)
    metadata = _metadata(source / CARD)
    on_hub = CACHED.search(source.absolute().as_posix())
    name = f"{on_hub[1]}/{on_hub[2]}" if on_hub else plain(str(metadata.get("model_name") or source.absolute().name))
    carried = {key: value for key in CARRIED if _is_names(value := metadata.get(key))}
    if "license" not in carried and isinstance(said := _config(source).get("license"), str):
        carried["license"] = said
    told = _told(metadata)
    if on_hub:
        carried["base_model"] = name
    elif told is not None and told.base is not None:
        name = told.base
        if _is_names(named := metadata.get("base_model")):
            carried["base_model"] = named
    elif named := _told_name(source, metadata):
        carried["base_model"] = named
    return Card(replace(told or Told(), base=name), carried)


def write_card(folder: Path, source: Path | None, plan: Plan | None, *, contrastive: bool, form: str | None) -> None:
    """Write the card of the checkpoint in `folder`; its quality is not known yet.

    Args:
        source: the checkpoint folder it was made from, if it was.
        plan: what was cut from that or, if that was cut already, before.
        contrastive: it scores pairs of image and text, instead of answering.
        form: of IN_TORCH, how its linears are held.
    """
    origin, config = _origin(source, folder), _config(folder)
    before = origin.told
    cut = None if plan is None else _cut(plan)
    again = before.cut is not None and before.cut != cut
    sparsity = config.get("slimvlm_sparsity")
    told = Told(
        base=before.base,
        contrastive=contrastive,
        code="auto_map" in config,
        cut=cut,
        earlier=before.cut.whole if before.cut is not None and again else before.earlier,
        form=form,
        zeros=sparsity.get("zeros") if isinstance(sparsity, dict) else None,
        recovered=None if again else before.recovered,
    )
    _write(folder, Card(told, origin.carried))


def tell_quality(folder: Path, recovered: Recovered | None, measured: Measured) -> None:
    """Write the card of the checkpoint in `folder` anew, now that it was measured, and list it in the manifest; a card
    that is not ours stays.
    """
    card = read_card(folder)
    if card is not None:
        _write(folder, replace(card, told=replace(card.told, recovered=recovered, measured=measured)))
        manifest = parse(content_of(folder / MANIFEST))
        path = folder / CARD
        manifest["files"][CARD] = FileEntry(bytes=path.stat().st_size, sha256=file_digest(path))
        write_text(folder / MANIFEST, dump(manifest, indent=2) + "\n")


def write_export_card(
    folder: Path, source: Path | None, graphs: str, *, contrastive: bool, tags: tuple[str, ...]
) -> None:
    """Write the card of an export of what lies in `source`, if it does; `graphs`: the part about its files."""
    origin = _origin(source, folder)
    _write(
        folder,
        Card(replace(origin.told, contrastive=contrastive, code=False, versions=installed_versions()), origin.carried),
        tags,
        graphs,
    )


def read_card(folder: Path) -> Card | None:
    """The card in `folder`; None: there is none, or it is not ours."""
    metadata = _metadata(folder / CARD)
    told = _told(metadata)
    if told is None:
        return None
    return Card(told, {key: metadata[key] for key in (*CARRIED, "base_model") if key in metadata})


def _write(folder: Path, card: Card, tags: tuple[str, ...] = (), graphs: str | None = None) -> None:
    from huggingface_hub import ModelCard, ModelCardData  # half a second to import

    told, carried = card.told, dict(card.carried)
    if told.cut is not None:
        tags = ("pruning", "structured-pruning", *tags)
    if told.zeros is not None:
        tags = ("sparsity", *tags)
    if told.form is not None:
        tags = ("quantization", told.form, *tags)
    relation = "quantized" if "quantization" in tags else "finetune" if told.recovered is not None else None
    named = carried.pop("base_model", None)
    task = "zero-shot-image-classification" if told.contrastive else "image-text-to-text"
    library = "transformers" if graphs is None else "transformers.js" if "onnx" in tags else None
    data = ModelCardData(
        **carried,
        base_model=named,
        base_model_relation=relation if named else None,
        library_name=library,
        pipeline_tag=task,
        tags=[OURS, *tags],
        slimvlm=json.loads(dump(asdict(told))),
    )
    facts: dict[str, Any] = {
        "told": told,
        "task": task,
        "graphs": graphs,
        "licence": carried.get("license"),
        "base_card": (folder / BASE_CARD).is_file(),
        "base_model": named if isinstance(named, str) else None,
    }
    write_text(folder / CARD, str(ModelCard.from_template(data, template_path=str(TEMPLATE), **facts)).rstrip() + "\n")


def _told_name(source: Path, metadata: Mapping[str, Any]) -> str | None:
    """What the model in a folder was on the Hub, or was made from there, as its card or else its config says."""
    for named in (metadata.get("base_model"), _config(source).get("_name_or_path")):
        one = named[0] if isinstance(named, list) and len(named) == 1 else named
        if isinstance(one, str) and len(one) <= LONGEST_NAME and ON_HUB.fullmatch(one) and not Path(one).exists():
            return one
    return None


def _carry_text(source: Path, folder: Path) -> None:
    """The card of the authors: the one in `source`, or the one that ours there carried."""
    for name in (BASE_CARD, CARD):
        if (source / name).is_file() and OURS not in _metadata(source / name):
            (folder / BASE_CARD).write_bytes((source / name).read_bytes())
            return


def _cut(plan: Plan) -> Cut:
    return Cut(
        ratio=plan.ratio,
        criterion=plan.criterion,
        allocator=plan.allocator,
        rounds=plan.rounds,
        compensation=plan.compensation.name if plan.compensation else "none",
        whole=Change(plan.parameters_before, plan.parameters_after),
        towers={name: Change(one.parameters_before, one.parameters_after) for name, one in plan.towers.items()},
    )


def _metadata(path: Path) -> dict[str, Any]:
    """Of a card, whoever wrote it; nothing where there is none that can be read."""
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    try:
        found = REGEX_YAML_BLOCK.search(content_of(path).decode("utf-8-sig"))
        metadata = yaml.safe_load(found.group(2)) if found and len(found.group(2)) < LONGEST_METADATA else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _told(metadata: Mapping[str, Any]) -> Told | None:
    try:
        return decode(metadata[OURS], Told) if OURS in metadata else None
    except ValueError:
        return None


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = parse(content_of(folder / "config.json"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _is_names(value: object) -> bool:
    """Whether it is what the Hub takes there: a name, or some."""
    names = value if isinstance(value, list) else [value]
    return 0 < len(names) <= MOST_NAMES and all(isinstance(one, str) and 0 < len(one) <= LONGEST_NAME for one in names)


def plain(name: str) -> str:
    """A name as it can stand in a line or a table of Markdown."""
    return re.sub(r"[^\w .:/()+,=-]", "", name).strip()[:LONGEST_NAME] or "unnamed"
