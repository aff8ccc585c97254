"""Runs a plan's searches over worker processes, and writes down what they found."""

import multiprocessing
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import optuna
from tqdm import tqdm

from examples.paper.experiments import Generation
from examples.paper.optimizers import entry
from examples.paper.plan import Plan, read_json, write_json
from examples.paper.runs import Job, run
from examples.paper.search import Search, open_storage, work

SEARCH_SEED = 10_000  # the first seed of the search's runs, which no training run uses


def searches(plan: Plan) -> list[Search]:
    """One search for each optimizer that has something to tune, all in the plan's storage."""
    storage = open_storage(plan.storage)
    experiment = plan.experiment
    samplers: dict[str, Callable[[], optuna.samplers.BaseSampler] | None] = {
        "genetic": None,
        "tpe": partial(optuna.samplers.TPESampler, constant_liar=True),
        "random": optuna.samplers.RandomSampler,
        "qmc": optuna.samplers.QMCSampler,
        "nsga2": optuna.samplers.NSGAIISampler,
    }
    make = samplers[plan.sampler]
    return [
        Search(
            f"{experiment.name}/{name}/{plan.sampler}",
            storage,
            entry(name).space,
            experiment.schedule,
            experiment.population,
            make() if make else None,
            options=experiment.task_options,
        )
        for name in plan.tunable
    ]


def score(
    plan: Plan,
    optimizer: str,
    hyperparameters: Mapping[str, float],
    generation: Generation,
    number: int,
    renew: Callable[[], None],
) -> float:
    """The mean loss over the last tenth of one run of the search; infinite where it diverged."""
    job = Job(
        experiment=plan.experiment.name,
        part="search",
        label=optimizer,
        task=plan.experiment.task,
        optimizer=optimizer,
        hyperparameters=hyperparameters,
        seed=SEARCH_SEED + number,
        steps=generation.steps,
        task_options=plan.experiment.task_options,
    )
    place = replace(plan.place, checkpoints=None)
    final = run(job, place, lambda done: renew())["final_loss"]
    return float("inf") if final is None else final


def search_worker(plan: Plan) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    work(searches(plan), [partial(score, plan, name) for name in plan.tunable])


def search(plan: Plan) -> None:
    """Runs or resumes the searches and writes the tuned hyperparameters."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    own = searches(plan)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=search_worker, args=(plan,), daemon=True) for _ in range(plan.workers)]
    for process in processes:
        process.start()
    total = sum(each.population * len(each.schedule) for each in own)
    with tqdm(total=total, unit="trial") as bar:
        while any(process.is_alive() for process in processes):
            bar.update(sum(each.trials_done() for each in own) - bar.n)
            time.sleep(1.0)
        bar.update(sum(each.trials_done() for each in own) - bar.n)
    done = [each for each in zip(plan.tunable, own, strict=True) if each[1].is_done()]
    write_json(plan.tuned_path, read_json(plan.tuned_path) | {name: each.best() for name, each in done})
    about = {name: {"sampler": plan.sampler} | each.plan for name, each in done}
    write_json(plan.out / "search.json", read_json(plan.out / "search.json") | about)
    if len(done) < len(own):
        raise RuntimeError(
            f"{len(own) - len(done)} of {len(own)} searches did not end, for their workers failed; what was finished "
            "is kept, and the same command goes on with the rest"
        )
