"""Compares optimizers on a GPT and on a ResNet: `python -m benchmarks.larger gpt` searches, trains and reports.

Whatever is killed goes on with the same command: finished runs are kept, the one that was under way is begun anew.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.larger.contenders import CONTENDERS, get_contender
from benchmarks.larger.gpt import DEPTH, HEAD_WIDTH, WIDTHS
from benchmarks.larger.plan import Plan, Records, make_finals, make_search, shortened
from benchmarks.larger.running import FINAL, SEARCH
from benchmarks.larger.tasks import TASKS, Options

REPORT = "report"
STAGES = (SEARCH, FINAL, REPORT)


def parse(arguments: Sequence[str] | None) -> tuple[Plan, tuple[str, ...]]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.larger", description=__doc__)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    gpt = tasks.add_parser("gpt", help=TASKS["gpt"].title)
    gpt.add_argument("--size", choices=WIDTHS, default="medium", help="0.2, 0.8 or 3.2 million parameters")
    gpt.add_argument("--width", type=int, help="of the embeddings, in place of --size")
    gpt.add_argument("--depth", type=int, default=DEPTH, help=f"number of blocks (default: {DEPTH})")
    gpt.add_argument("--context", type=int, default=64, help="tokens that a prediction sees at most (default: 64)")
    gpt.add_argument("--batch-size", type=int, default=12, help="windows in a batch (default: 12)")
    gpt.add_argument("--tied", action="store_true", help="the last layer shares its weight with the embedding")
    resnet = tasks.add_parser("resnet", help=TASKS["resnet"].title)
    resnet.add_argument("--data-root", type=Path, metavar="DIR", help="folder of CIFAR-10's files")
    resnet.add_argument("--depth", type=int, default=8, help="number of layers, 6 n + 2 (default: 8)")
    resnet.add_argument("--batch-size", type=int, default=128, help="images in a batch (default: 128)")
    for task in (gpt, resnet):
        _add_common(task)
    options = parser.parse_args(arguments)
    try:
        return _plan(options), _stages(options)
    except ValueError as error:
        (gpt if options.task == "gpt" else resnet).error(str(error))


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stages", default=",".join(STAGES), help=f"comma-separated, of {', '.join(STAGES)}")
    parser.add_argument("--contenders", help=f"separated by semicolons, of {'; '.join(CONTENDERS)}")
    parser.add_argument("--seeds", default="0,1,2", help="of the final runs, comma-separated (default: 0,1,2)")
    parser.add_argument("--steps", type=int, help="of a final run; those of the search follow in proportion")
    parser.add_argument("--search-steps", type=int, help="of a run of the search")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--out", type=Path, help="folder of records and report (default: out/larger/TASK)")


def _plan(options: argparse.Namespace) -> Plan:
    """
    Raises:
        ValueError: for an argument out of range.
    """
    for name in ("width", "depth", "context", "batch_size", "steps", "search_steps", "threads"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    task = TASKS[options.task]
    names = [name.strip() for name in options.contenders.split(";")] if options.contenders else list(CONTENDERS)
    for name in names:
        get_contender(name)
    _check_device(options.device)
    stages = _stages(options)
    _check_packages(names, stages)
    if task.needs_data and options.data_root is None and set(stages) != {REPORT}:
        raise ValueError(f"{task.name} needs --data-root, the folder of CIFAR-10's files")
    plan = Plan(
        task=task,
        out=options.out or Path("out") / "larger" / task.name,
        options=_gpt_options(options) if task.name == "gpt" else _resnet_options(options),
        contenders=list(dict.fromkeys(names)),
        seeds=_seeds(options.seeds),
        steps=task.steps,
        search_steps=task.search_steps,
        threads=options.threads,
        device=options.device,
        data_root=getattr(options, "data_root", None),
    )
    return shortened(plan, options.steps, options.search_steps)


def _stages(options: argparse.Namespace) -> tuple[str, ...]:
    given = options.stages.split(",")
    if unknown := [stage for stage in given if stage not in STAGES]:
        raise ValueError(f"--stages must be of {', '.join(STAGES)}, got {', '.join(unknown)}")
    return tuple(stage for stage in STAGES if stage in given)


def _seeds(given: str) -> list[int]:
    if not all(part.strip().isdecimal() for part in given.split(",")):
        raise ValueError(f"--seeds must be whole numbers of at least 0, separated by commas, got {given!r}")
    return list(dict.fromkeys(int(part) for part in given.split(",")))


def _gpt_options(options: argparse.Namespace) -> Options:
    width = options.width or WIDTHS[options.size]
    if width > HEAD_WIDTH and width % HEAD_WIDTH:
        raise ValueError(f"--width must be a multiple of {HEAD_WIDTH}, or less than that, got {width}")
    kept = {name: getattr(options, name) for name in ("depth", "context", "batch_size")}
    return {"width": width, **kept, "is_tied": options.tied}


def _resnet_options(options: argparse.Namespace) -> Options:
    if options.depth < 8 or options.depth % 6 != 2:
        raise ValueError(f"--depth must be 8, 14, 20 or another 6 n + 2, got {options.depth}")
    return {"depth": options.depth, "batch_size": options.batch_size}


def _check_device(device: str) -> None:
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {device!r}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device must be there, got {device!r} with {torch.cuda.device_count()} CUDA devices")


def _check_packages(names: Sequence[str], stages: Sequence[str]) -> None:
    """Says at the start which package is missing, rather than after hours."""
    needed = {"matplotlib"} if REPORT in stages else set()
    if set(stages) != {REPORT} and any(get_contender(name).needs_pytorch_optimizer for name in names):
        needed.add("pytorch_optimizer")
    if missing := sorted(name for name in needed if importlib.util.find_spec(name) is None):
        raise ValueError(f"{', '.join(missing)} must be installed: pip install -e '.[benchmarks]'")


def main(arguments: Sequence[str] | None = None) -> None:
    plan, stages = parse(arguments)
    plan.out.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[Plan, Records, str], None]] = {SEARCH: make_search, FINAL: make_finals}
    try:
        records = Records(plan.records_path)
        data = "" if set(stages) == {REPORT} else plan.task.name_data(plan.data_root)
        for stage in stages:
            if stage in makers:
                makers[stage](plan, records, data)
            else:
                from benchmarks.larger.report import write_report  # matplotlib, only where pictures are drawn

                print(write_report(plan, records))
    except (ValueError, FileNotFoundError) as error:  # no data, or nothing to report on
        sys.exit(str(error))


if __name__ == "__main__":
    main()
