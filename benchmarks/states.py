"""Which state of a recovery to keep: rules of choice, replayed on the states of trainings (table of docs/recovery.md).

    slimvlm compress demo/model RUN --data demo/samples/train.jsonl --eval-data demo/samples/test.jsonl --ratio 0.5 \
        --equal-rounds --train-batch-size 32 --export none --no-profile               # a cut, and others like it
    python benchmarks/states.py measure FILE RUN ... --seeds 0 1   # a line per training; goes on where it was stopped
    python benchmarks/states.py table FILE --questions 64         # Markdown

Every state that a training validates is scored besides on the demo's validation questions, 1,680. A replay draws images
of these with as many questions as a training holds out, lets a rule choose by them, and judges its choice by the rest.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from slimvlm.compress.data.samples import Sample, load_samples
from slimvlm.compress.data.splits import VALIDATION_SAMPLES, read_measured, read_trained
from slimvlm.compress.evaluation.evaluate import evaluate
from slimvlm.compress.evaluation.quality import Quality, Row, summarize
from slimvlm.compress.plan import Plan
from slimvlm.compress.progress import silent
from slimvlm.compress.recovery.learning import Work
from slimvlm.compress.recovery.recover import recover
from slimvlm.compress.recovery.training.choice import Score, Validation, validation_of
from slimvlm.compress.recovery.training.history import History
from slimvlm.compress.run_record import options_of, read_record
from slimvlm.demo import SAMPLES

DRAWS = 100
HINDSIGHT = "the best by the judging questions"
Rule = Callable[[Sequence[Validation], int], int]  # of the states and how many questions judged them, to a number


# ------------------------------------------------------------------ measure


def measure(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    samples = load_samples(SAMPLES / "val.jsonl", limit=arguments.limit).samples
    for seed in arguments.seeds:
        for run in arguments.runs:
            key = {"run": run.name, "seed": seed, "steps": arguments.steps, "questions": len(samples)}
            if any(all(row[name] == value for name, value in key.items()) for row in read(arguments.out)):
                continue
            row = {**key, **states_of(run, seed, arguments, samples)}
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(run.name, seed, [round(100 * state["score"][0], 1) for state in row["states"]], flush=True)


def states_of(run: Path, seed: int, arguments: argparse.Namespace, others: Sequence[Sample]) -> dict[str, Any]:
    """What a training of the cut in `run` is worth at each of its validations, on its own held-out samples and on
    `others`: the mean of tasks and minus the loss; of every question whether it was right, and its loss."""
    asked = {"seed": seed, "steps": arguments.steps, "validate_every": arguments.validate_every, "recover": "lpd"}
    how = replace(options_of(run, read_record(run)), **asked)
    plan = Plan.from_json((run / "plan.json").read_text())
    data = read_trained(how, read_measured(how))
    states: list[dict[str, Any]] = []
    questions: list[list[Any]] = []

    def judge(work: Work, model: PreTrainedModel) -> Validation:
        own, found = (evaluate(model, work.collator, some, batch_size=64) for some in (work.data.validation, others))
        pairs = [(quality.score, -quality.scores["token_loss"]) for quality in (own, found)]
        right = "".join(str(int(row.exact or 0)) for row in found.rows)
        millinats = [round(1000 * (row.loss or 0.0)) for row in found.rows]
        states.append({"own": pairs[0], "score": pairs[1], "right": right, "millinats": millinats})
        questions[:] = [[row.task, row.image, row.tokens] for row in found.rows]
        return validation_of(own)

    replaced, Work.judge = Work.judge, judge  # type: ignore[method-assign,assignment]
    try:
        with tempfile.TemporaryDirectory() as folder:
            cut = run / ("cut" if (run / "cut").is_dir() else "model")
            history = recover(how, plan, cut, data, Path(folder, "training"), silent).history
    finally:
        Work.judge = replaced  # type: ignore[method-assign]
    facts = {"held_out": len(data.validation), "trained": history.steps, "removed": round(plan.removed_fraction, 4)}
    return {
        **facts,
        "asked": questions,
        "states": states[: history.validations],
    }  # the merged one is the kept one again


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ------------------------------------------------------------------ rules


def slimvlm(states: Sequence[Validation], questions: int) -> int:
    """What a training does."""
    history = History()
    for number, state in enumerate(states):
        history.steps = number
        history.add_validation(state, last_stage=True)
    return history.best_step


def within_an_error(states: Sequence[Validation], questions: int) -> int:
    highest = max(state.score[0] for state in states)
    bar = highest - math.sqrt(highest * (1 - highest) / questions)
    return max(places(states), key=lambda number: (states[number].score[0] >= bar, states[number].score[1]))


def places(states: Sequence[Validation]) -> range:
    return range(len(states))


RULES: dict[str, Rule] = {
    "no training": lambda states, questions: 0,
    "the last": lambda states, questions: len(states) - 1,
    "the highest score, then the lowest loss": lambda states, questions: max(
        places(states), key=lambda number: states[number].score
    ),
    "the lowest loss": lambda states, questions: max(places(states), key=lambda number: states[number].score[1]),
    "the lowest loss of those within one standard error of the highest score": within_an_error,
    "the last that is not measurably worse (slimvlm)": slimvlm,
}


def table(arguments: argparse.Namespace) -> None:
    rows = read(arguments.out)
    names = [f"{100 * row['removed']:.0f} %, {row['trained']} steps" for row in rows]
    print(f"| kept is | {' | '.join(names)} | mean | mean loss |\n|---|{'---|' * (len(rows) + 2)}")
    found = [replayed(row, arguments.questions) for row in rows]
    for rule in (*RULES, HINDSIGHT):
        scores, losses = ([of[rule][place] for of in found] for place in (0, 1))
        cells = " | ".join(f"{100 * score:.1f}" for score in (*scores, mean(scores)))
        print(f"| {rule} | {cells} | {mean(losses):.4f} |")


def replayed(row: dict[str, Any], size: int) -> dict[str, Score]:
    """Of each rule the mean score and loss, on the questions it has not seen, of the states that it chose."""
    right = np.array([list(map(float, state["right"])) for state in row["states"]])
    losses = np.array([state["millinats"] for state in row["states"]]) / 1000
    tasks, images, tokens = (np.array([question[part] for question in row["asked"]]) for part in (0, 1, 2))

    def qualities(questions: np.ndarray) -> list[Quality]:
        asked = np.flatnonzero(questions)
        return [
            summarize(
                "generation",
                [Row("", tasks[i], None, "", of[i], 0.0, loss[i], int(tokens[i])) for i in asked],
                blind=False,
                seconds=0.0,
            )
            for of, loss in zip(right, losses, strict=True)
        ]

    generator = np.random.default_rng(0)
    chosen: dict[str, list[Score]] = {rule: [] for rule in (*RULES, HINDSIGHT)}
    for _ in range(DRAWS):
        order = generator.permutation(images.max() + 1)
        sizes = np.cumsum(np.bincount(images)[order])
        drawn = np.isin(images, order[: np.searchsorted(sizes, size) + 1])
        seen, judged = (list(map(validation_of, qualities(questions))) for questions in (drawn, ~drawn))
        for name, rule in RULES.items():
            chosen[name].append(judged[rule(seen, int(drawn.sum()))].score)
        chosen[HINDSIGHT].append(max(state.score for state in judged))
    return {
        name: (mean(score for score, _ in found), -mean(loss for _, loss in found)) for name, found in chosen.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("measure", "table"))
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, help="of a training (default: one pass over the samples)")
    parser.add_argument("--validate-every", type=int, help="steps (default: as a recovery has it)")
    parser.add_argument("--limit", type=int, help="questions to score on (default: all of the split)")
    parser.add_argument("--questions", type=int, default=VALIDATION_SAMPLES, help="to choose by, in a replay")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    {"measure": measure, "table": table}[arguments.command](arguments)


if __name__ == "__main__":
    main()
