"""Runs for the tests of the comparison on many tasks."""

import json
import math
from dataclasses import asdict, replace

from benchmarks.environment import environment
from benchmarks.shootout.choosing import confirmation_jobs
from benchmarks.shootout.contenders import RECOMMENDED, fixed_options, get_contender
from benchmarks.shootout.plan import Plan, next_trial
from benchmarks.shootout.running import CHOOSING, Job
from benchmarks.shootout.spaces import defaults as defaults_of
from benchmarks.shootout.tasks import get_task


def plan(out, **changes):
    fields = {"tasks": ["rosenbrock"], "contenders": ["AdamW", "LODO"], "trials": 4, "steps": 20, "seeds": 1}
    return Plan(out=out, draws=20, **fields | changes)


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
        "curve": None if a_job.stage in CHOOSING else {"step": at, "seconds": seconds, "loss": [score or 9.0] * steps},
        "validation": held_out if get_task(a_job.task).is_validated else None,
        "idle_loss": 9.0,
        "seconds": steps / 100,
        "optimizer_seconds": steps / 300,
        "environment": environment(),
    }


def on_bowl(a_job, best=0.02):
    """A record of losses that are a bowl in log lr, instead of a run. Validation wants lr x 3."""
    lr = a_job.hyperparameters["lr"]
    harm = (a_job.schedule == "warmup_cosine") + 0.1 * a_job.hyperparameters.get("nesterov", 0)
    for name, right in (("beta1", 0.1), ("beta2", 1e-2)):  # so that no end is the best
        harm += 0.1 * math.log((1 - a_job.hyperparameters.get(name, 1 - right)) / right) ** 2
    losses = [0.1 + math.log(lr / wanted) ** 2 + harm for wanted in (best, 3 * best)]
    return fake(a_job, None if lr > 5e2 else losses[0], losses[1])


def searched(a_plan, task, contender, records, stop=100, best=0.02):
    """Makes a search's trials on a bowl, and returns all jobs."""
    jobs = []
    while len(jobs) < stop and (a_job := next_trial(a_plan, task, contender, records)):
        jobs.append(a_job)
        records.append(on_bowl(a_job, best))
    return jobs


def confirmed(a_plan, task, contender, records, make=on_bowl):
    """Makes the runs of a search's best trials at further seeds, and returns their jobs."""
    a_plan, made = replace(a_plan, tasks=[task.name], contenders=[contender.name]), []
    while new := [job for job in confirmation_jobs(a_plan, records) if job not in made]:
        records.extend(make(each) for each in new)
        made += new
    return made


def settled(a_plan, task, contender, records):
    """Makes all that a choice waits for, and returns the trials."""
    jobs = searched(a_plan, task, contender, records)
    confirmed(a_plan, task, contender, records)
    return jobs
