"""Runs for the tests of the comparison on many tasks."""

from benchmarks.shootout.contenders import RECOMMENDED, fixed_options, get_contender
from benchmarks.shootout.running import Job


def defaults(name):
    contender = get_contender(name)
    return fixed_options(name, RECOMMENDED) | {key: each.default for key, each in contender.space.items()}


def job(task="rosenbrock", contender="AdamW", **changes):
    fields = {"schedule": "constant", "seed": 0, "steps": 20, "stage": "final"} | changes
    return Job(
        task=task, contender=contender, hyperparameters=fields.pop("hyperparameters", defaults(contender)), **fields
    )
