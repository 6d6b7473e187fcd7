"""What a model multiplies and keeps, read from the shapes of its checkpoint: no weights are loaded and none are run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from slimvlm.compress.models.checkpoint import build_meta
from slimvlm.compress.models.families import Attention, Family, Resampler, Tower
from slimvlm.compress.models.groups import Group, count_parameters, find_groups
from slimvlm.compress.models.quantized import held_form
from slimvlm.serve.judging.roofline import EMBEDDINGS, HEAD, LANGUAGE, PROJECTOR, VISION, Attended, Product, Shapes

Config = Any  # of transformers: which fields it has depends on the family
Kind = TypeVar("Kind", bound=nn.Module)


def checkpoint_shapes(folder: str | os.PathLike[str], trust_remote_code: bool = False) -> Shapes:
    """The shapes of a checkpoint (dense, per-layer or stock; float or quantized), from its config.

    Raises:
        CheckpointError, UnsupportedModelError: as `build_meta`.
    """
    return model_shapes(*build_meta(folder, trust_remote_code, held_form(Path(folder))))


def model_shapes(model: nn.Module, family: Family) -> Shapes:
    """The shapes of `model` (the meta device is enough)."""
    groups = find_groups(model, family, dead=True)
    places = tuple(_places(family))
    products = [found for path, module in model.named_modules() for found in _products(path, module, places, family)]
    attended = [_tower_attention(group, model, family) for group in groups if group.kind == "attention"]
    patch, width = _patches(model, places, family)
    classes = sum(_rows(model.get_parameter(name)) for tower in family.towers for name in tower.before)
    queries = getattr(model.config, family.features) if family.features else 0
    if family.resampler is not None:
        attended += _resampler_attention(model, family.resampler)
        queries = _rows(model.get_parameter(family.resampler.queries))
    attended += [
        Attended("image", "patch", module.embed_dim) for module in _placed(model, places, nn.MultiheadAttention)
    ]
    return Shapes(
        family=family.name,
        kind=family.kind,
        parameters=count_parameters(model),
        products=tuple(products),
        attended=tuple(attended),
        patch=patch,
        class_tokens=classes,
        merged=_merged(model, family, width),
        queries=queries,
        widths=tuple(group.size * group.head_dim for group in groups),
        class_features=classes - (getattr(model.config, family.cropped, family.cropped) == "default"),
    )


# ------------------------------------------------------------------ where a module belongs

Place = tuple[str, str, str]  # path, part, kind of tokens


def _places(family: Family) -> Iterator[Place]:
    """Where the parts of a model are; the first place that a path lies in is its own."""
    for path in (family.export.head, f"{family.export.text}.lm_head"):
        yield path, HEAD, "head"
    if family.contrastive:
        yield from zip(family.projector, (PROJECTOR, PROJECTOR), ("image", "pooled"), strict=True)
    else:
        fixed = "query" if family.resampler or family.features else "feature"
        for path in family.projector:
            yield path, PROJECTOR, "patch" if family.resampler and family.resampler.projected else fixed
    if family.resampler:
        yield family.resampler.module, PROJECTOR, "query"
    for tower in family.towers:
        yield _parent(tower.blocks), VISION if tower.modality == "vision" else LANGUAGE, _kind(tower, family)
    for tower in family.towers:  # what lies beside the encoder of a tower: embeddings, norms
        others = (other for other in family.towers if other is not tower and other.modality != "vision")
        if not any(_inside(other.blocks, tower.root) for other in others):
            yield tower.root, VISION if tower.modality == "vision" else LANGUAGE, _kind(tower, family)


def _kind(tower: Tower, family: Family) -> str:
    if tower.modality == "vision":
        return "patch"
    if family.contrastive:
        return "text"
    return "encoder" if tower.name == "encoder" else "decoder"


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _inside(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}.")


def _place(path: str, places: tuple[Place, ...]) -> Place | None:
    return next((place for place in places if _inside(path, place[0])), None)


def _placed(model: nn.Module, places: tuple[Place, ...], *kinds: type[Kind]) -> Iterator[Kind]:
    """Modules of some kinds that lie in a place."""
    return (one for path, one in model.named_modules() if isinstance(one, kinds) and _place(path, places))


# ------------------------------------------------------------------ products


def _products(path: str, module: nn.Module, places: tuple[Place, ...], family: Family) -> Iterator[Product]:
    """What the module's own parameters are good for."""
    own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    place = _place(path, places)
    if not own or place is None:
        return
    _, part, kind = place
    if isinstance(module, nn.Linear):
        yield Product(part, _seen(path, kind, family), module.weight.numel(), own)
    elif isinstance(module, (nn.Conv2d, nn.Conv3d)):
        yield Product(EMBEDDINGS, "pixel", module.weight.numel(), own)
    elif isinstance(module, nn.MultiheadAttention):  # a probe pools the patches: one query, their keys and values
        third = module.in_proj_weight.numel() // 3
        yield Product(part, "image", third, own // 3)
        yield Product(part, "patch", 2 * third, own - own // 3)
    elif part == PROJECTOR and not family.contrastive and (matrices := _matrices(module)):
        yield Product(part, kind, sum(matrices), own)
    elif isinstance(module, nn.Embedding) and part == LANGUAGE:
        yield Product(EMBEDDINGS, kind, looked_up=module.embedding_dim)
    else:
        yield Product(EMBEDDINGS if isinstance(module, nn.Embedding) else part, kind, parameters=own)


def _matrices(module: nn.Module) -> list[int]:
    """Weights of what the module itself multiplies with (Gemma 3's projector)."""
    own = module.named_parameters(recurse=False)
    return [weight.numel() for name, weight in own if weight.ndim == 2 and name.endswith("weight")]


def _rows(tokens: nn.Parameter) -> int:
    """How many tokens a parameter [..., C] has."""
    return tokens.numel() // tokens.shape[-1]


def _seen(path: str, kind: str, family: Family) -> str:
    """Keys and values of cross attention are made of other tokens than its queries."""
    if family.resampler and _inside(path, family.resampler.module):
        is_cross = f".{family.resampler.cross}." in path
        return family.resampler.reads if is_cross and path.rpartition(".")[2] in family.resampler.rows[1:] else kind
    for tower in family.towers:
        for part in tower.parts:
            if isinstance(part, Attention) and part.key == "cross_attn" and _inside(path, tower.blocks):
                names = (f".{part.module}.{row}" for row in part.rows[1:])
                if path.endswith(tuple(names)):
                    return "memory"
    return kind


def _patches(model: nn.Module, places: tuple[Place, ...], family: Family) -> tuple[tuple[int, int], int]:
    """(height and width of a patch, the tower's width); where no convolution makes patches, pixels come in them."""
    for one in _placed(model, places, nn.Conv2d, nn.Conv3d):
        return (one.stride[-2], one.stride[-1]), one.out_channels
    config: Config = getattr(model.config, family.towers[0].config)
    return (config.patch_size, config.patch_size), config.hidden_size


def _merged(model: nn.Module, family: Family, hidden_size: int) -> int:
    """Patches that become one feature: the projector's first matrix takes them side by side."""
    if family.contrastive or family.resampler or family.features:
        return 1
    kinds = nn.Linear, nn.Conv2d
    first = next(one for one in model.get_submodule(family.projector[0]).modules() if isinstance(one, kinds))
    layers = getattr(model.config, "vision_feature_layer", 0)  # states of several layers are put side by side as well
    return first.weight[0].numel() // (hidden_size * (len(layers) if isinstance(layers, (list, tuple)) else 1))


# ------------------------------------------------------------------ attentions


def _tower_attention(group: Group, model: nn.Module, family: Family) -> Attended:
    tower = next(tower for tower in family.towers if tower.name == group.tower)
    width, kept = group.size * group.head_dim, 2 * group.kv_heads * group.head_dim
    kind = _kind(tower, family)
    if kind == "patch":
        return Attended(kind, kind, width, window=_window(getattr(model.config, tower.config), tower, group.layer))
    if kind != "decoder":
        return Attended(kind, kind, width)
    return Attended(kind, "source" if group.key.endswith("cross_attn") else "context", width, kept)


def _window(config: Config, tower: Tower, layer: int) -> int | None:
    """Patches of one window of a layer that attends within windows; None: all of an image."""
    if tower.windows is None:
        return None
    side, whole = (getattr(config, field) for field in tower.windows)
    return None if layer in whole else int(side // config.patch_size) ** 2


def _resampler_attention(model: nn.Module, resampler: Resampler) -> list[Attended]:
    found = []
    for path, module in model.get_submodule(resampler.module).named_modules():
        query = getattr(module, resampler.rows[0], None)
        if isinstance(query, nn.Linear):
            read = resampler.reads if f".{resampler.cross}." in f".{path}." else "query"
            found.append(Attended("query", read, query.out_features))
    return found
