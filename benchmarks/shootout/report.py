"""Writes report.md and its pictures from the records alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.environment import PACKAGES
from benchmarks.shootout import pictures, tables
from benchmarks.shootout.bootstrap import LEVEL
from benchmarks.shootout.changes import EVERYWHERE, NOTHING_CHANGED
from benchmarks.shootout.contenders import ANCHOR, CLOCK, RECOMMENDED, REFERENCE
from benchmarks.shootout.plan import CHANGE_SEED, Plan
from benchmarks.shootout.problem import TRAINING, VALIDATION
from benchmarks.shootout.results import AIMS, Results, collect
from benchmarks.shootout.running import Record
from benchmarks.shootout.scores import PENALTY, TAU, best_goal, goal_of
from examples.paper.records import whole

EARLIER_GOALS = Path(__file__).parent / "earlier_goals.json"
COLUMNS = (
    "`steps` and `seconds` are geometric means of what the goal takes: steps as a share of the task's budget, CPU "
    f"seconds relative to a whole run of fused AdamW (`{CLOCK}`). A task whose goal is not reached counts as "
    f"{PENALTY:g} whole runs: in seconds, of the contender's own if they take longer. `profile` is the integral of the "
    f"performance profile over tau from 1 to {TAU:g} among the table's rows, 1 for whoever is the fastest on every "
    f"task. In brackets are {100 * LEVEL:.0f} % intervals of a bootstrap over tasks and seeds. `diverged` is the share "
    "of the runs; `ends below` counts the tasks on which the final loss is not above the goal, which may be passed "
    "and lost again. Means and profiles are over the tasks that a contender ran on. Who sets the goal reaches it by "
    "construction. Seconds compare implementations as well as methods: AdamW's and LODO's kernels are native (not "
    "Nesterov's AdamW), the other peers are Python over torch."
)


def write_report(plan: Plan) -> Path:
    results = collect(plan)
    drawn = pictures.draw(results, plan.out)
    parts = ["# Optimizers on small tasks", _about(results)]
    parts += ["## Without tuning", *_untuned(results)]
    parts += ["## Tuned on every task", *_tuned(results)]
    parts += ["## Which goals untuned LODO reaches", *_goals(results)]
    parts += ["## Whether AdamW was tuned well enough", *_family(results)]
    if results.factors:
        pictures.robustness(tables.by_factor(results), plan.out / "robustness.png")
        parts += ["## When the learning rate is wrong", *_robustness(results)]
    if results.changes.get(NOTHING_CHANGED):
        parts += ["## With one thing changed", *_changes(results)]
    parts += [
        "## Final losses",
        *_losses(results),
        "## Seconds",
        *_seconds(results),
        "## Settings",
        *_settings(results),
    ]
    parts += ["## Curves", *(_image(name, f"Losses on {name[7:-4]}") for name in drawn)]
    path = plan.out / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _image(name: str, text: str) -> str:
    return f"![{text}]({name})"


def _about(results: Results) -> str:
    runs = [run for finals in results.finals.values() for each in finals.values() for run in each]
    seeds = whole({run["job"]["seed"] for run in runs})
    names = ("lodo", "python", *PACKAGES)
    versions = {name: sorted({str(run["environment"].get(name)) for run in runs}) for name in names}
    told = ", ".join(f"{name} {' and '.join(found)}" for name, found in versions.items())
    machines = sorted({_machine(run["environment"]) for run in runs})
    loads = [run["environment"]["load"] for run in runs if run["environment"]["load"] is not None]
    load = f", load {min(loads):g} to {max(loads):g}" if loads else ""
    recommended = results.plan.recommended
    options = ", ".join(f"{key}={value!r}" for key, value in recommended.items())
    untuned = "lodo.AutoLODO(params)" if recommended == RECOMMENDED else f"lodo.LODO(params, {options})"
    lines = [
        f"{len(results.tasks)} tasks, {len(results.contenders)} contenders, seeds {seeds}; {len(results.records)} runs "
        f"on record, searches included. One thread each on {'; '.join(machines)}{load}; {told}.",
        f"The protocol is in benchmarks/README.md, the peers' searches in docs/peers.md. Untuned LODO is `{untuned}`.",
    ]
    sources = sorted({str(run["environment"].get("lodo_source")) for run in _of_lodo(results)})
    if len(sources) > 1:
        lines.append(f"**LODO's runs are of different code**: {', '.join(sources)}.")
    if missing := [task for task in results.plan.tasks if task not in results.tasks]:
        lines.append(f"**Not run**: {', '.join(missing)}.")
    if missing := [name for name in results.plan.contenders if name not in results.contenders]:
        lines.append(f"**Not run yet**: {', '.join(missing)}.")
    return "\n\n".join(lines)


def _of_lodo(results: Results) -> list[Record]:
    """Its final runs, and those at wrong learning rates."""
    every = [*results.finals.values(), *results.factors.values()]
    return [run for runs in every for (_, name), found in runs.items() if name.startswith("LODO") for run in found]


def _machine(environment: Mapping[str, Any]) -> str:
    return f"{environment.get('processor') or environment['machine']}, {environment['cores']} cores"


def _untuned(results: Results) -> list[str]:
    parts = [
        "One setting for all tasks. The peers' are the best of a few dozen candidates on the tasks to choose on; the "
        f"goal is what `{ANCHOR}`, with a warm-up and a cosine, ends at."
    ]
    for aim in AIMS:
        goals = goal_of(ANCHOR)
        parts += [f"**By {aim} loss**:", tables.standing(results, aim, results.untuned, goals, results.tasks)]
    parts += [COLUMNS, _image("profile_untuned.png", "Performance profiles of what runs with one setting")]
    parts += [
        "By split: tasks reached, and the geometric mean of the steps. The candidates were compared, and LODO's "
        "defaults chosen, on the tasks to choose on; while the latter were, most of the tasks that were held out were "
        "looked at too (docs/experiments.md says where). The fresh ones were added when LODO's defaults were settled, "
        "and none of the candidates has seen them."
    ]
    for aim in AIMS:
        parts += [f"**By {aim} loss**:", tables.by_split(results, aim, results.untuned, goal_of(ANCHOR))]
    return parts


def _tuned(results: Results) -> list[str]:
    parts = [
        f"All contenders, each tuned on every task for the loss in question. The goal is what tuned {REFERENCE} ends "
        "at."
    ]
    for aim in AIMS:
        goals = goal_of(REFERENCE)
        parts += [f"**By {aim} loss**:", tables.standing(results, aim, results.contenders, goals, results.tasks)]
    parts += [_image("profile_tuned.png", "Performance profiles of all contenders")]
    parts += ["By split: tasks reached, and the geometric mean of the steps."]
    for aim in AIMS:
        parts += [f"**By {aim} loss**:", tables.by_split(results, aim, results.contenders, goal_of(REFERENCE))]
    parts += ["The goal is the lowest final loss of all contenders of this report but LODO:"]
    for aim in AIMS:
        goals = best_goal(results.peers)
        parts += [f"**By {aim} loss**:", tables.standing(results, aim, results.contenders, goals, results.tasks)]
    return parts


def _goals(results: Results) -> list[str]:
    named = {
        f"tuned {REFERENCE}": goal_of(REFERENCE),
        ANCHOR: goal_of(ANCHOR),
        "best of all peers": best_goal(results.peers),
    }
    parts = ["Tasks reached, and the geometric mean of the steps.", tables.reached_goals(results, named)]
    before = json.loads(EARLIER_GOALS.read_text(encoding="utf-8"))
    text = (
        f"The goals that tuned {REFERENCE} set in the comparison before this one, whose searches had twelve trials "
        "with each schedule and no warm-up, beside the present ones, by training loss:"
    )
    return [*parts, text, tables.goals_before(results, before["goals"])]


def _family(results: Results) -> list[str]:
    parts = [
        f"Final losses of Adam's relatives over tuned {REFERENCE}'s, whose search has Nesterov's momentum among its "
        f"choices. Below {tables.LEAD:g}, in bold, they say that the search was too weak."
    ]
    for aim in AIMS:
        parts += [f"**By {aim} loss**:", tables.family(results, aim)]
    return parts


def _robustness(results: Results) -> list[str]:
    parts = [
        f"Tasks whose goal, tuned {REFERENCE}'s training loss, is reached; how many times as many steps it takes as at "
        f"lr x 1, at the same seeds (median over the tasks, a goal that is not reached counting as {PENALTY:g} runs); "
        "the share of diverged runs."
    ]
    for title, splits in tables.SPLITS.items():
        if tasks := results.tasks_of(splits):
            parts += [f"**{title.capitalize()}**:", tables.robustness(results, tasks)]
    return [
        *parts,
        _image("robustness.png", "Share of tasks whose goal is reached, by the factor of the learning rate"),
    ]


def _changes(results: Results) -> list[str]:
    return [
        f"Untuned LODO with one thing changed, at the seed {CHANGE_SEED}, of no other runs; the goal is {REFERENCE}'s "
        "final training loss. `loss` is the geometric mean of the final losses over those of the unchanged call. Parts "
        "left out, on all tasks:",
        tables.changes(results, EVERYWHERE),
        "Other numbers, on the tasks to choose on:",
        tables.changes(results, ("choose",)),
    ]


def _losses(results: Results) -> list[str]:
    return [
        "Median over the seeds, with their range. The lowest is bold. Training loss is the mean over the last tenth of "
        "the steps, at settings tuned for it:",
        tables.losses(results, TRAINING),
        "Validation loss at the end, and accuracy where there is one, at settings tuned for that loss:",
        tables.losses(results, VALIDATION),
    ]


def _seconds(results: Results) -> list[str]:
    text = "CPU seconds of a run, median over the seeds, and the share of the optimizer's own steps."
    return [text, tables.seconds(results)]


def _settings(results: Results) -> list[str]:
    parts = ["What was chosen; * stands at an end of the range where the search began, which it went on to widen."]
    for aim in AIMS:
        parts += [f"**By {aim} loss**:", tables.settings(results, aim)]
    return parts
