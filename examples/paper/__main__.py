"""Runs the paper's experiments: `python -m examples.paper bowl` searches, trains and reports.

`--help` lists what can be shortened.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from examples.paper.experiments import EXPERIMENTS, Experiment, Generation
from examples.paper.optimizers import entry
from examples.paper.plan import Plan, read_tuned, sweep_jobs, training_jobs
from examples.paper.runs import Place, run_all

STAGES = ("search", "train", "sweep", "report")
NEEDS_DATA = ("generation", "classification")
LEAST = {
    **dict.fromkeys(("workers", "threads", "steps", "runs", "batch_size", "sweep_steps", "sweep_runs"), 1),
    **dict.fromkeys(("generations", "search_steps", "validation_images", "test_images"), 1),
    "trials": 2,  # the better half of which is averaged
    "validate_every": 0,
}


def parse(arguments: Sequence[str] | None) -> tuple[Plan, tuple[str, ...]]:
    parser = argparse.ArgumentParser(prog="python -m examples.paper", description=__doc__)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated, of search, train, sweep, report")
    parser.add_argument("--optimizers", help="comma-separated; all of the experiment's unless given")
    parser.add_argument("--out", type=Path, help="folder of all results; out/paper/EXPERIMENT unless given")
    parser.add_argument("--data-root", type=Path, help="folder with MNIST's or CIFAR-10's files")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes for searches and runs")
    parser.add_argument("--threads", type=int, help="of each process; the machine's cores, shared out, unless given")
    parser.add_argument("--steps", type=int, help="of each training run")
    parser.add_argument("--runs", type=int, help="training runs of each optimizer, at seeds 0, 1, ...")
    parser.add_argument("--validate-every", type=int, help="in steps")
    parser.add_argument("--batch-size", type=int, help="of the image tasks")
    parser.add_argument("--validation-images", type=int, help="of the image tasks")
    parser.add_argument("--test-images", type=int, help="of image generation")
    parser.add_argument("--sweep-steps", type=int, help="of each run of a sweep; as --steps unless given")
    parser.add_argument("--sweep-runs", type=int, help="runs of each point of a sweep; as --runs unless given")
    parser.add_argument("--trials", type=int, help="individuals of each generation of the search")
    parser.add_argument("--generations", type=int, help="fewer generations, picked evenly from the schedule")
    parser.add_argument("--search-steps", type=int, help="an upper limit to the steps of each run of the search")
    parser.add_argument("--sampler", choices=("genetic", "tpe", "random", "qmc", "nsga2"), default="genetic")
    parser.add_argument("--storage", help="Optuna's database URL or journal file, to share a search among machines")
    options = parser.parse_args(arguments)
    stages = tuple(options.stages.split(","))
    if unknown := set(stages) - set(STAGES):
        parser.error(f"--stages must be of {', '.join(STAGES)}, got {', '.join(sorted(unknown))}")
    for name, least in LEAST.items():
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    try:
        return make_plan(options, set(stages)), stages
    except ValueError as error:
        parser.error(str(error))


def make_plan(options: argparse.Namespace, stages: set[str]) -> Plan:
    experiment = shaped(EXPERIMENTS[options.experiment], options)
    names = tuple(dict.fromkeys(options.optimizers.split(","))) if options.optimizers else experiment.optimizers
    for name in names:
        entry(name)
    check_packages(names, stages)
    if "LODO-Transplanted" in names:
        raise ValueError("LODO-Transplanted is part of the bowl's sweeps, which run it after so many steps of LODO")
    if experiment.task in NEEDS_DATA and options.data_root is None and {"search", "train", "sweep"} & stages:
        raise ValueError(f"{experiment.name} needs --data-root, the folder of its data")
    if experiment.task not in NEEDS_DATA and not options.device.startswith("cpu"):
        raise ValueError(f"--device must be cpu for {experiment.name}, got {options.device}")
    out = options.out or Path("out") / "paper" / experiment.name
    threads = options.threads or max(1, (os.cpu_count() or 1) // options.workers)
    return Plan(
        experiment=experiment,
        optimizers=names,
        out=out,
        place=Place(options.device, options.data_root, threads, options.workers, out / "checkpoints", out / "samples"),
        workers=options.workers,
        storage=options.storage or str(out / "search.journal"),
        sampler=options.sampler,
        sweep_runs=options.sweep_runs or experiment.runs,
        sweep_steps=options.sweep_steps or experiment.steps,
    )


def check_packages(optimizers: Sequence[str], stages: set[str]) -> None:
    """Says at the start which package is missing, rather than after hours.

    Raises:
        ValueError: naming the packages.
    """
    needed = {"matplotlib"} if "report" in stages else set()
    needed |= {"tqdm"} if stages != {"report"} else set()
    needed |= {"optuna"} if "search" in stages else set()
    needed |= {"pytorch_optimizer"} if {"Yogi", "LARS"} & set(optimizers) and stages != {"report"} else set()
    if missing := sorted(name for name in needed if importlib.util.find_spec(name) is None):
        raise ValueError(f"{', '.join(missing)} must be installed: pip install -e '.[paper]'")


def shaped(experiment: Experiment, options: argparse.Namespace) -> Experiment:
    """The experiment with what the command line changes."""
    schedule = experiment.schedule
    if options.generations and options.generations < len(schedule):
        last = len(schedule) - 1
        picks = range(options.generations)
        schedule = tuple(schedule[last - round(pick * last / options.generations)] for pick in reversed(picks))
    if options.search_steps:
        schedule = tuple(Generation(each.std, min(each.steps, options.search_steps)) for each in schedule)
    names = ("batch_size", "validation_images", "test_images")
    given = {name: getattr(options, name) for name in names}
    task_options = {name: value for name, value in given.items() if value is not None}
    if task_options and experiment.task not in NEEDS_DATA:
        raise ValueError(
            f"{', '.join(task_options)}: only the image tasks have them, got the experiment {experiment.name}"
        )
    changes = {
        "steps": options.steps,
        "runs": options.runs,
        "population": options.trials,
        "validate_every": options.validate_every,
    }
    return replace(
        experiment,
        schedule=schedule,
        task_options=dict(experiment.task_options) | task_options,
        **{name: value for name, value in changes.items() if value is not None},
    )


def main(arguments: Sequence[str] | None = None) -> None:
    plan, stages = parse(arguments)
    plan.out.mkdir(parents=True, exist_ok=True)
    if "search" in stages and plan.tunable:
        from examples.paper.tuning import search  # Optuna, only where something is searched

        search(plan)
    if "train" in stages:
        run_all(training_jobs(plan, read_tuned(plan)), plan.results_path, plan.place, plan.workers)
    if "sweep" in stages and plan.experiment.sweeps and "LODO" in plan.optimizers:
        run_all(sweep_jobs(plan, read_tuned(plan)), plan.results_path, plan.place, plan.workers)
    if "report" in stages:
        from examples.paper.report import write_report  # matplotlib, only where pictures are drawn

        print(write_report(plan.experiment, plan.out), file=sys.stderr)


if __name__ == "__main__":
    main()
