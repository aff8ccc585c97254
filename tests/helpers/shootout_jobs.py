"""Runs for the tests of the comparison on many tasks."""

import json
from dataclasses import asdict

from benchmarks.environment import environment
from benchmarks.shootout.contenders import RECOMMENDED, fixed_options, get_contender
from benchmarks.shootout.running import TUNE, Job
from benchmarks.shootout.spaces import defaults as defaults_of
from benchmarks.shootout.tasks import get_task


def defaults(name, task="rosenbrock"):
    contender = get_contender(name)
    space = contender.candidates[0] if contender.candidates else defaults_of(contender.space_of(get_task(task)))
    return {key: value for key, value in (fixed_options(name, RECOMMENDED) | space).items() if key != "schedule"}


def job(task="rosenbrock", contender="AdamW", **changes):
    fields = {"schedule": "constant", "seed": 0, "steps": 20, "stage": "final"} | changes
    hyperparameters = fields.pop("hyperparameters", None) or defaults(contender, task)
    return Job(task=task, contender=contender, hyperparameters=hyperparameters, **fields)


def fake(a_job, score, validation=None):
    """A record as `run` leaves it, without the run; the validation loss is the score too, unless given."""
    steps = a_job.steps
    at = [float(step) for step in range(1, steps + 1)]
    seconds = [step / 100 for step in at]
    ends = score if validation is None else validation
    held_out = {"step": at, "seconds": seconds, "loss": [ends] * steps, "accuracy": [None] * steps}
    return {
        "format": 1,
        "key": a_job.key,
        "job": json.loads(json.dumps(asdict(a_job))),
        "score": score,
        "curve": None if a_job.stage == TUNE else {"step": at, "seconds": seconds, "loss": [score or 9.0] * steps},
        "validation": held_out if get_task(a_job.task).is_validated else None,
        "idle_loss": 9.0,
        "seconds": steps / 100,
        "optimizer_seconds": steps / 300,
        "environment": environment(),
    }
