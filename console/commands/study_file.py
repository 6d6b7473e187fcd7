"""The file of a study: beds, and rows whose options are those of `slimvlm compress`, a list of values for an axis.

Values are read as the command line reads them, so whatever is a choice there is one here, and nothing is listed twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any  # what a TOML or JSON file holds, and what options of all types become

import click

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.files.decoding import MisfitError, refused_as, shown
from slimvlm.compress.options import ComputeOptions, CutOptions, EvaluateOptions, SparsifyOptions
from slimvlm.compress.sparsity.rules import PATTERNS
from slimvlm.console.commands.cutting import compress, sparsify
from slimvlm.console.options.making import FILE_OR_FOLDER, NAME, POSITIVE, TEXT
from slimvlm.console.options.reading import (
    converted,
    inside,
    known_keys,
    option_value,
    read_document,
    table_of,
    there,
    word,
)
from slimvlm.serve.study.study import BLIND, DENSE, Bed, Cell, said_of, said_of_zeros

ADVICE = "write it as docs/study.md shows"
PLACES = ("model", "data", "val", "test")
TIMED = ("evaluate", "cut", "round", "step")
OPTIONS, ZEROING = (
    {str(one.name): one for one in reversed(command.params) if isinstance(one, click.Option)}
    for command in (compress, sparsify)
)
OF_BEDS = {*(field.name for field in fields(ComputeOptions)), "eval_samples", "max_bad_samples", "prefix_split"}
NOT_STUDIED = {"model", "data", "eval_data", "out", "resume", "overwrite", "cost"}
STUDIED = {field.name for field in fields(CutOptions)} - NOT_STUDIED - OF_BEDS
ZEROED = {field.name for field in fields(SparsifyOptions)} - NOT_STUDIED - OF_BEDS  # where a row names `sparsity`
OF_ROWS = {"bed", "one_plan"}  # besides options


def read_cells(path: Path) -> list[Cell]:
    """All cells of the study in the TOML or JSON file `path`, in the order they are written down.

    Raises:
        UnsuitableOptionError: the file cannot be read; or the place in it that says what nothing can take.
    """
    with refused_as(path, UnsuitableOptionError, ADVICE):
        tables = _known(read_document(path), {"bed", "all", "row"})
        beds, cells = list[Bed](), list[Cell]()
        for name, table in table_of(tables.get("bed", {})).items():
            with inside(f"bed {name}"):
                beds.append(_bed(path.parent, name, table))
        with inside("all"):
            common = _known(tables.get("all", {}), STUDIED | OF_ROWS)
        for number, row in enumerate(_list(tables.get("row", [])), start=1):
            with inside(f"row {number}"):
                cells += _cells(path.parent, beds, common, row)
        return _distinct(cells)


def _bed(folder: Path, name: str, table: object) -> Bed:
    told = _known(table, {*PLACES, "seconds", *OF_BEDS})
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}", name):
        raise MisfitError("its name is of letters, digits, dots and dashes")
    if absent := [place for place in PLACES[:3] if place not in told]:
        raise MisfitError(f"key {absent[0]!r} is missing")
    samples, seconds = dict[str, Path](), dict[str, float]()
    for place in PLACES[1:]:
        if place in told:
            with inside(place):
                samples[place] = converted(FILE_OR_FOLDER, there(folder, told[place]))
    for step, value in _known(told.get("seconds", {}), set(TIMED)).items():
        with inside(step):
            seconds[step] = converted(POSITIVE, value)
    with inside("model"):
        model = converted(NAME, there(folder, told["model"]))
    options = {name: option_value(folder, OPTIONS[name], told[name]) for name in OF_BEDS if name in told}
    return Bed(name, model, **samples, options=options, seconds=seconds)


def _cells(folder: Path, beds: list[Bed], common: Mapping[str, Any], row: object) -> Iterator[Cell]:
    zeroed = "sparsity" in table_of(row)
    known, options_of = (ZEROED | {"bed"}, ZEROING) if zeroed else (STUDIED | OF_ROWS, OPTIONS)
    own = _known(row, known | {"name"})
    told = {**{name: value for name, value in common.items() if name in known}, **own}
    template, one_plan = converted(TEXT, told.pop("name", "")), told.pop("one_plan", False)
    if not isinstance(one_plan, bool):
        raise MisfitError(f"one-plan: {shown(one_plan)} is not true or false")
    chosen = _chosen(beds, told.pop("bed", [bed.name for bed in beds]))
    axes = {
        name: [option_value(folder, options_of[name], one) for one in _values(options_of[name], told[name])]
        for name in told
    }
    ratios, seeds = axes.pop("ratio", [CutOptions.ratio]), axes.pop("seed", [CutOptions.seed])
    for bed, *values in product(chosen, *axes.values()):
        given = {**bed.options, **dict(zip(axes, values, strict=True))}
        if one_plan and len(ratios) > 1:
            given["equal_rounds"] = True
        for seed, ratio in product(seeds, ratios):
            asked = {**given, "ratio": ratio, "seed": seed}
            cell = (
                _zeros_cell(bed, asked) if zeroed else _cut_cell(folder, bed, asked, max(ratios) if one_plan else ratio)
            )
            name = _named(template, cell.zeros or cell.options, [axis for axis in axes if axis in own], axes)
            yield replace(cell, method=name)


def _cut_cell(folder: Path, bed: Bed, asked: Mapping[str, Any], largest: float) -> Cell:
    options = CutOptions(model=bed.model, data=bed.data, eval_data=bed.val, out=Path(), **asked).resolved()
    return Cell(bed, "", options, largest, said_of(options, largest, folder))


def _zeros_cell(bed: Bed, asked: Mapping[str, Any]) -> Cell:
    zeros = SparsifyOptions(model=bed.model, data=bed.data, out=Path(), **asked)
    if PATTERNS.get(zeros.sparsity) is not None:  # it has its share by itself; the ratio says which that should be
        zeros = replace(zeros, ratio=None)
    same = {name: value for name, value in asked.items() if name not in ("sparsity", "rule", "allocator", "tokens")}
    options = CutOptions(
        model=bed.model, data=bed.data, eval_data=bed.val, out=Path(), rounds=1, recover="none", **same
    )
    return Cell(bed, "", options, options.ratio, said_of_zeros(zeros), zeros)


def _named(template: str, options: EvaluateOptions, own: list[str], axes: Mapping[str, list[Any]]) -> str:
    """What a row is called: by its template, and by what it varies that the template does not say."""
    try:
        name = template.format_map(vars(options))
    except (KeyError, ValueError, IndexError, AttributeError):
        raise MisfitError(f"name: {shown(template)} is no name with options as {{criterion}} in it") from None
    unsaid = [axis for axis in own if f"{{{axis}}}" not in template and (len(axes[axis]) > 1 or not template)]
    words = [name, *(f"{axis.replace('_', '-')} {getattr(options, axis)}" for axis in unsaid)]
    return ", ".join(word for word in words if word) or "default"


def _distinct(cells: list[Cell]) -> list[Cell]:
    """The cells, if no two are called the same."""
    found: dict[tuple[object, ...], Cell] = {}
    for cell in cells:
        if cell.method in (DENSE, BLIND):
            raise MisfitError(f"row {cell.method}: that is what the model without a cut is called")
        key = cell.bed.name, cell.method, cell.options.ratio, cell.options.seed
        if found.setdefault(key, cell) is not cell:
            raise MisfitError(f"two rows are called {shown(cell.method)}; give them names")
    return cells


def _chosen(beds: list[Bed], names: object) -> list[Bed]:
    known = {bed.name: bed for bed in beds}
    names = [names] if isinstance(names, str) else _list(names)
    if unknown := [name for name in names if name not in known]:
        raise MisfitError(f"bed: {shown(unknown[0])} is unknown; known are {', '.join(known)}")
    return [known[name] for name in names]


def _values(option: click.Option, told: object) -> list[Any]:
    """The values along the axis of an option; of one that is a list itself those are lists of lists."""
    if option.multiple and not isinstance(told, Mapping):
        nested = isinstance(told, list) and told and all(isinstance(one, list | Mapping) for one in told)
        return told if nested and isinstance(told, list) else [told]
    if told == []:
        raise MisfitError(f"{word(option)}: it has no value")
    return told if isinstance(told, list) else [told]


def _known(told: object, names: set[str]) -> dict[str, Any]:
    """As `known_keys`; of what is for another table it says where that is."""
    found = {name.replace("-", "_") for name in table_of(told)}
    if misplaced := sorted((found - names) & {*PLACES, *OF_BEDS}):
        raise MisfitError(f"key {shown(misplaced[0].replace('_', '-'))} is for [bed.NAME]: it is the same for all rows")
    return known_keys(told, names)


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise MisfitError(f"{shown(value)} is not a list")
    return value
