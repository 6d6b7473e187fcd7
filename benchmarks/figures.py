"""What slimvlm measured of itself, for `slimvlm advise`: the packaged table, from results of studies.

    python benchmarks/figures.py RESULTS.jsonl ... > serve/advising/figures.json

RESULTS are of `slimvlm study`, or the lines that were written before there was one. Where test questions were asked
the figures are of those, else of validation. Every figure names its file.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from earlier import METHODS, RECIPES, STEPS, base_of, read

from slimvlm.compress.files.decoding import dump
from slimvlm.serve.advising.figures import Figure
from slimvlm.serve.study.choosing import summaries
from slimvlm.serve.study.study import TEST, rows_in

COMPARABLE = 0.01  # of all parameters: what an earlier cut may be off its ratio


def of_study(path: Path) -> Iterator[Figure]:
    rows = rows_in(path)
    found = summaries(rows)
    tested = {(one.bed, one.method, one.ratio) for one in found if one.split == TEST}
    for one in found:
        if one.score is None or one.kept is None or "sparsity" in one.measured[0].options:
            continue  # a model with zeros is as large as it was: no rival of a cut
        if (one.split == TEST) == ((one.bed, one.method, one.ratio) in tested):
            recovered = one.measured[0].options.get("recover", "none") != "none"
            source = f"{path.name}, {one.measured[0].questions} questions of {one.split}"
            scores = [row.score for row in one.measured if row.score is not None]
            yield figure((one.bed, one.method, one.ratio, recovered), scores, one.kept.mean, source)


def of_earlier(path: Path) -> Iterator[Figure]:
    """Of recoveries that were measured before there was a study."""
    rows = [row for row in read(path) if row.get("split") == TEST and row.get("score") is not None]
    base, cells = base_of(rows), defaultdict(list)
    for row in rows:
        if row.get("recipe", "none") == "none" or (row["data"], row["steps"]) != ("all", STEPS):
            continue
        if abs(row["removed"] - row["ratio"]) <= COMPARABLE:
            cells[f"{METHODS[row['cut']]}, then {RECIPES[row['recipe']]}", row["ratio"], True].append(row)
    for (method, ratio, recovered), found in cells.items():
        scores = [row["score"] / 100 for row in found]
        kept = (100 * mean(scores) - base["blind"]) / (base["dense"] - base["blind"])
        source = f"{path.name}, {found[0]['questions']} questions of test"
        yield figure(("demo", method, ratio, recovered), scores, kept, source)


def figure(of: tuple[str, str, float, bool], scores: Sequence[float], kept: float, source: str) -> Figure:
    low, middle, high = (round(value(scores), 4) for value in (min, mean, max))
    return Figure(*of, score=middle, low=low, high=high, kept=round(kept, 4), sets=len(scores), source=source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    figures: list[Figure] = []
    for path in parser.parse_args().results:
        figures += of_study(path) if "bed" in read(path)[0] else of_earlier(path)
    print("[\n" + ",\n".join(dump(asdict(one)) for one in figures) + "\n]")


if __name__ == "__main__":
    main()
