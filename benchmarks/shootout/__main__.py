"""Compares optimizers on many small tasks: `python -m benchmarks.shootout` tunes, trains and reports.

Whatever is killed goes on where it was when the same command is given again.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.shootout.bootstrap import DRAWS
from benchmarks.shootout.contenders import CONTENDERS, RECOMMENDED, get_contender
from benchmarks.shootout.jobs import left_out
from benchmarks.shootout.plan import Plan
from benchmarks.shootout.running import CALIBRATE, CHANGE, CONFIRM, FINAL, ROBUST, TUNE
from benchmarks.shootout.sharing import work_on
from benchmarks.shootout.tasks import SEALED_TASKS, TASKS, get_task

REPORT = "report"
STAGES = (TUNE, CALIBRATE, CONFIRM, FINAL, ROBUST, CHANGE, REPORT)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shootout", description=__doc__)
    parser.add_argument("--stages", default=",".join(STAGES), help=f"comma-separated, of {', '.join(STAGES)}")
    parser.add_argument("--tasks", help=f"comma-separated, of {', '.join(TASKS)}")
    parser.add_argument("--contenders", help=f"separated by semicolons, of {'; '.join(CONTENDERS)}")
    parser.add_argument("--data-root", type=Path, help="folder of MNIST's files; its tasks are skipped without")
    parser.add_argument("--out", type=Path, default=Path("out") / "shootout", help="folder of records and report")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--trials", type=int, help="of every search, instead of the protocol's numbers")
    parser.add_argument("--steps", type=int, help="of every run, instead of the tasks' own; for trying out")
    parser.add_argument("--seeds", type=int, help="final runs of each pair, at seeds 0, 1, ..., not the protocol's")
    parser.add_argument("--robust-seeds", type=int, default=3, help="the same at every wrong learning rate")
    parser.add_argument("--draws", type=int, default=DRAWS, help="of the bootstrap")
    parser.add_argument("--redo", action="store_true", help="LODO's runs with other code than the present one again")
    parser.add_argument(
        "--sealed", action="store_true", help="the sealed tasks instead of the others: to be looked at once"
    )
    parser.add_argument(
        "--lodo", default="{}", help="JSON: options of untuned LODO, over the recommended ones; null drops one"
    )
    return parser


def parse(arguments: Sequence[str] | None) -> tuple[Plan, tuple[str, ...]]:
    parser = _parser()
    options = parser.parse_args(arguments)
    for name in ("workers", "trials", "steps", "seeds", "robust_seeds", "draws"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    stages = tuple(stage for stage in STAGES if stage in options.stages.split(","))
    if unknown := set(options.stages.split(",")) - set(STAGES):
        parser.error(f"--stages must be of {', '.join(STAGES)}, got {', '.join(sorted(unknown))}")
    try:
        return _plan(options, stages), stages
    except ValueError as error:
        parser.error(str(error))


def _plan(options: argparse.Namespace, stages: Sequence[str]) -> Plan:
    default = SEALED_TASKS if options.sealed else TASKS
    tasks = list(dict.fromkeys(options.tasks.split(","))) if options.tasks else list(default)
    names = [name.strip() for name in options.contenders.split(";")] if options.contenders else list(CONTENDERS)
    for task in tasks:
        if get_task(task).name in SEALED_TASKS and not options.sealed:
            raise ValueError(f"the task {task!r} is sealed, to be looked at once: --sealed opens it")
    for name in names:
        get_contender(name)
    _check_packages(names, stages)
    if options.data_root is None and set(stages) != {REPORT}:
        for task in [task for task in tasks if get_task(task).needs_mnist]:
            print(f"{task} is skipped: it needs --data-root, the folder of MNIST's files", file=sys.stderr)
            tasks.remove(task)
    try:
        given = json.loads(options.lodo)
    except json.JSONDecodeError as error:
        raise ValueError(f"--lodo must be JSON, got {options.lodo!r} ({error})") from error
    if not isinstance(given, dict):
        raise ValueError(f"--lodo must be a JSON object, got {options.lodo!r}")
    recommended = {key: value for key, value in {**RECOMMENDED, **given}.items() if value is not None}
    return Plan(
        out=options.out,
        tasks=tasks,
        contenders=list(dict.fromkeys(names)),
        data_root=options.data_root,
        workers=options.workers,
        recommended=recommended,
        trials=options.trials,
        seeds=options.seeds,
        robust_seeds=options.robust_seeds,
        steps=options.steps,
        redoes=options.redo,
        draws=options.draws,
    )


def _check_packages(contenders: Sequence[str], stages: Sequence[str]) -> None:
    """Says at the start which package is missing, rather than after hours.

    Raises:
        ValueError: naming the packages.
    """
    needed = {"matplotlib"} if REPORT in stages else set()
    needed |= {"optuna", "scipy"} if TUNE in stages else set()  # its Gaussian process needs it
    if set(stages) != {REPORT}:
        needed |= {"sklearn", *(package for name in contenders for package in get_contender(name).packages)}
    if missing := sorted(name for name in needed if importlib.util.find_spec(name) is None):
        raise ValueError(f"{', '.join(missing)} must be installed: pip install -e '.[benchmarks]'")


def main(arguments: Sequence[str] | None = None) -> None:
    plan, stages = parse(arguments)
    failures: list[str] = []
    plan.out.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        if stage == REPORT:
            from benchmarks.shootout.report import write_report  # matplotlib, only where pictures are drawn

            try:
                print(write_report(plan), file=sys.stderr)
            except ValueError as error:  # nothing to report on
                sys.exit(str(error))
            continue
        if stage in (CONFIRM, FINAL, ROBUST) and (missing := left_out(plan, stage, plan.load())):
            print(f"{stage}: left out, for their settings are not chosen yet: {'; '.join(missing)}", file=sys.stderr)
        try:
            work_on(plan, stage)
        except RuntimeError as error:
            failures.append(str(error))
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
