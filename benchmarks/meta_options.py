"""What LODO's options that save memory or time cost: `meta_state_dtype`, `momentum_dtype`, `meta_every`.

    python -m benchmarks.meta_options                      # some 18 minutes, half of them rounding to nearest
    python -m benchmarks.meta_options --stages time        # one part of it: state, digits, bowl, time
    python -m benchmarks.meta_options --steps 200 --rounds 3 --out out/tryout    # tries it all out, in a minute

Bytes of state; the loss on the paper's noisy bowl (n = 100, float64, the default network at its tuned rates) and on
scikit-learn's digits (the lean network), each the mean over the last tenth of the steps; and the time of a step
relative to that of the first setting. Results are appended to meta_options.csv in --out as they come, and a run goes
on with what that file lacks; meta_options.md is the table of all there is. Use a quiet machine for the times.
"""

import argparse
import csv
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import lodo
from benchmarks.measuring import device_name, state_bytes, time_calls
from examples.image_data import ImageData, batches, digits
from examples.paper.tasks.bowl import NoisyBowl
from examples.train_classifier import TASKS, Run, Settings

LEAN = {"depth": 4, "expansion": 1, "permutation": "shuffle"}
BFLOAT16 = "bfloat16"

STATE_SIZE = 10_000
BOWL_RATES: dict[str, Any] = {  # of docs/paper/bowl
    "lr": 0.10786901973800705,
    "meta_lr": 0.00066566406982297,
    "beta": 0.11612335428129539,
}
BOWL_STEPS = 20_000
FIRST_WALK = 100
WALKS = 3
SLOW_WALKS = 2  # of a setting in plain torch
DIGITS_STEPS = 1_000
DIGITS_META_LR = 3e-3
SEEDS = 5
TIMED = {  # what a step is timed on
    "time, n = 100": (100, torch.float64, {}),
    "time, n = 95,000": (95_000, torch.float32, LEAN),
}
BATCH = 24  # steps timed together: whole periods of every meta_every here
STAGES = ("state", "digits", "bowl", "time")


@dataclass(frozen=True)
class Setting:
    """A row of the table.

    Attributes:
        nearest: round moments to the nearest bfloat16 number instead of stochastically, which only plain torch does.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    nearest: bool = False

    @contextmanager
    def around(self) -> Iterator[None]:
        """What the steps of this setting run in."""
        with ExitStack() as stack:
            if self.nearest:
                stack.enter_context(mock.patch.dict(os.environ, {"LODO_NATIVE": "0"}))
                stack.enter_context(mock.patch("lodo.inner_optimizer.to_bfloat16", to_nearest))
            yield


def to_nearest(values: Tensor, bits: Tensor) -> Tensor:
    """In place of `lodo.rounding.to_bfloat16`."""
    return values.to(torch.bfloat16)


MOMENTS = {"meta_state_dtype": BFLOAT16}
MOMENTUM = {"momentum_dtype": BFLOAT16}
SETTINGS = (
    Setting("none of them"),
    Setting("moments in bfloat16", MOMENTS),
    Setting("moments in bfloat16, rounded to nearest", MOMENTS, nearest=True),
    Setting("momentum in bfloat16", MOMENTUM),
    Setting("moments and momentum in bfloat16", MOMENTS | MOMENTUM),
    Setting("meta_every=2", {"meta_every": 2}),
    Setting("meta_every=4", {"meta_every": 4}),
    Setting("meta_every=8", {"meta_every": 8}),
    Setting("meta_every=4, moments and momentum in bfloat16", {"meta_every": 4} | MOMENTS | MOMENTUM),
)


@dataclass
class Row:
    """One measurement: a line of the CSV.

    Attributes:
        measure: "state, default" and "state, lean" in bytes per parameter; "bowl" and "digits", mean loss over the last
            tenth; a key of `TIMED`, time over that of the first setting in the same round, median and percentiles.
        steps: of training; rounds of the timing.
        run: number of the walk or the seed.
        ms: median time of one step.
    """

    date: str
    torch: str
    cpu: str
    measure: str
    setting: str
    steps: int
    run: int
    value: float
    p20: float | None = None
    p80: float | None = None
    ms: float | None = None

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.measure, self.setting, self.steps, self.run


class Results:
    """The rows in a CSV file, to which new ones are appended at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path.exists():
            with path.open(newline="") as file:
                self.rows = [_parse(line) for line in csv.DictReader(file)]

    def add(self, measure: str, setting: Setting, steps: int, run: int, value: float, **more: float) -> None:
        today = datetime.date.today().isoformat()
        row = Row(today, torch.__version__, device_name("cpu"), measure, setting.name, steps, run, value, **more)
        is_new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)])
            if is_new:
                writer.writeheader()
            numbers = {name: f"{number:.6g}" for name, number in asdict(row).items() if isinstance(number, float)}
            writer.writerow(asdict(row) | numbers)
        self.rows.append(row)
        print(f"{measure}, {setting.name}, run {run}: {value:.6g}", flush=True)

    def has(self, measure: str, setting: Setting, steps: int, run: int) -> bool:
        return any(row.key == (measure, setting.name, steps, run) for row in self.rows)

    def of(self, measure: str, setting: Setting) -> list[Row]:
        """By run; only those with the most steps, should a file hold several kinds."""
        found = [row for row in self.rows if row.key[:2] == (measure, setting.name)]
        most = max((row.steps for row in found), default=0)
        return sorted((row for row in found if row.steps == most), key=lambda row: row.run)


def _parse(line: dict[str, str]) -> Row:
    values: dict[str, Any] = {**line, "steps": int(line["steps"]), "run": int(line["run"])}
    values["value"] = float(line["value"])
    for name in ("p20", "p80", "ms"):
        values[name] = float(line[name]) if line[name] else None
    return Row(**values)


# ---- the measurements -----------------------------------------------------------------------------------------------


def optimizer_of(setting: Setting, size: int, dtype: torch.dtype, network: dict[str, Any]) -> lodo.LODO:
    """After its first step, on random numbers and with tiny rates."""
    x = torch.nn.Parameter(torch.randn(size, dtype=dtype))
    x.grad = 1e-2 * torch.randn(size, dtype=dtype)
    optimizer = lodo.LODO([x], lr=1e-2, meta_lr=1e-4, **network, **setting.options)
    optimizer.step()
    return optimizer


def measure_state(results: Results) -> None:
    for measure, network in (("state, default", {}), ("state, lean", LEAN)):
        for setting in SETTINGS:
            if not results.has(measure, setting, 1, 0):
                optimizer = optimizer_of(setting, STATE_SIZE, torch.float32, network)
                results.add(measure, setting, 1, 0, state_bytes(optimizer) / STATE_SIZE)


def last_tenth(losses: Sequence[float]) -> float:
    return mean(losses[-max(1, len(losses) // 10) :])


def bowl_loss(setting: Setting, steps: int, walk: int) -> float:
    task = NoisyBowl(0, walk_seed=walk)  # the same H for all
    optimizer = lodo.LODO(task.params, **BOWL_RATES, **setting.options)
    losses = []
    with setting.around():
        for _ in range(steps):
            task.draw()
            losses.append(task.backward())
            optimizer.step()
    return last_tenth(losses)


def measure_bowl(results: Results, steps: int) -> None:
    for setting in sorted(SETTINGS, key=lambda setting: setting.nearest):  # the slow one last
        for walk in range(FIRST_WALK, FIRST_WALK + (SLOW_WALKS if setting.nearest else WALKS)):
            if not results.has("bowl", setting, steps, walk):
                results.add("bowl", setting, steps, walk, bowl_loss(setting, steps, walk))


def digits_loss(setting: Setting, data: ImageData, steps: int, seed: int) -> float:
    task = TASKS["digits"]
    rates = {"lr": task.lr["lodo"], "meta_lr": DIGITS_META_LR}
    count, pixels = data.train_images.shape
    run = Run("lodo", pixels, Settings("digits", task.hidden, task.batch_size, seed, "cpu", **rates))
    run.optimizer.param_groups[0].update(setting.options)  # before the first step, as if given to the constructor
    indices = batches(count, task.batch_size, seed, 0)
    with setting.around():
        for _ in range(steps):
            picked = next(indices)
            run.advance(data.train_images[picked], data.train_labels[picked])
    return last_tenth(run.losses)


def measure_digits(results: Results, steps: int) -> None:
    data = digits()
    for setting in SETTINGS:
        for seed in range(SEEDS):
            if not results.has("digits", setting, steps, seed):
                results.add("digits", setting, steps, seed, digits_loss(setting, data, steps, seed))


def measure_time(results: Results, rounds: int) -> None:
    """All settings that have kernels, in turns; the turn begins with another one in every round."""
    settings = [setting for setting in SETTINGS if not setting.nearest]
    for measure, (size, dtype, network) in TIMED.items():
        if all(results.has(measure, setting, rounds, 0) for setting in settings):
            continue
        steps = [optimizer_of(setting, size, dtype, network).step for setting in settings]
        times = timed_in_turns(steps, rounds)
        for setting, mine in zip(settings, times, strict=True):
            p20, median, p80 = percentiles([one / base for one, base in zip(mine, times[0], strict=True)])
            results.add(measure, setting, rounds, 0, median, p20=p20, p80=p80, ms=percentiles(mine)[1])


def timed_in_turns(functions: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """For each function the milliseconds of a call in each round."""
    times: list[list[float]] = [[] for _ in functions]
    for number in range(rounds):
        for turn in range(len(functions)):
            which = (number + turn) % len(functions)
            functions[which]()  # brings its arrays into the cache
            times[which] += time_calls(functions[which], 1, "cpu", BATCH)
    return times


def percentiles(values: Sequence[float]) -> list[float]:
    """20th, 50th and 80th."""
    wanted = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return torch.tensor(values, dtype=torch.float64).quantile(wanted).tolist()


# ---- the table ------------------------------------------------------------------------------------------------------

COLUMNS = (
    "setting",
    "state B/param, default",
    "lean",
    "bowl: mean loss",
    "of each walk",
    "digits: mean loss, 1e-4",
    "least to most of the seeds",
    "time, n = 100",
    "20 to 80 %",
    "time, n = 95,000, lean",
    "20 to 80 %",
)
NOTES = """\
Losses are training losses over the last tenth of the steps, at rates that were tuned without these options. The walks
of the bowl share H. Times are of `step()` alone, over that of the first setting in the same round; its row gives ms.
Rounding to nearest runs in plain torch, slowly: it is not timed, and has fewer walks of the bowl."""


def markdown(results: Results, command: str) -> str:
    last = results.rows[-1]
    header = f"{last.date}: {last.cpu}, {torch.get_num_threads()} thread, torch {last.torch}, `{command}`"
    titles = ("setting", "bowl, each walk", "digits, each seed", "digits, geometric mean")
    parts = (
        "# What the options that save memory or time cost",
        header,
        as_table(COLUMNS, [cells(results, setting) for setting in SETTINGS]),
        NOTES,
        "## Losses over those of the first setting",
        "Each over the one on the same walk of the centre, or with the same first weights and the same batches.",
        as_table(titles, [paired_cells(results, setting) for setting in SETTINGS[1:]]),
    )
    return "\n\n".join(parts) + "\n"


def as_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    marks = [":---", *["---:"] * (len(titles) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (titles, marks, *rows))


def cells(results: Results, setting: Setting) -> tuple[str, ...]:
    states = [results.of(f"state, {network}", setting) for network in ("default", "lean")]
    bowl = [row.value for row in results.of("bowl", setting)]
    on_digits = [1e4 * row.value for row in results.of("digits", setting)]
    few = f" ({len(bowl)} walks only)" if 0 < len(bowl) < WALKS else ""
    return (
        setting.name,
        *(f"{rows[0].value:,.1f}" if rows else "" for rows in states),
        f"{mean(bowl):.3f}{few}" if bowl else "",
        ", ".join(f"{value:.3f}" for value in bowl),
        f"{mean(on_digits):.2f}" if on_digits else "",
        f"{min(on_digits):.2f} to {max(on_digits):.2f}" if on_digits else "",
        *time_cells(results.of("time, n = 100", setting), setting is SETTINGS[0]),
        *time_cells(results.of("time, n = 95,000", setting), setting is SETTINGS[0]),
    )


def time_cells(rows: Sequence[Row], is_first: bool) -> tuple[str, str]:
    """The median of the ratios with its spread; for the first setting milliseconds."""
    if not rows:
        return "", ""
    (row,) = rows
    return (f"1 ({row.ms:.3f} ms)", "") if is_first else (f"{row.value:.2f}", f"{row.p20:.2f} to {row.p80:.2f}")


def paired_cells(results: Results, setting: Setting) -> tuple[str, ...]:
    bowl, on_digits = (paired(results, measure, setting) for measure in ("bowl", "digits"))
    logarithms = [torch.tensor(ratio).log().item() for ratio in on_digits]
    geometric = f"{torch.tensor(mean(logarithms)).exp().item():.2f}" if logarithms else ""
    return (
        setting.name,
        ", ".join(f"{ratio:.4f}" for ratio in bowl),
        ", ".join(f"{ratio:.2f}" for ratio in on_digits),
        geometric,
    )


def paired(results: Results, measure: str, setting: Setting) -> list[float]:
    base = {row.key[2:]: row.value for row in results.of(measure, SETTINGS[0])}
    return [row.value / base[row.key[2:]] for row in results.of(measure, setting) if row.key[2:] in base]


# ---- command line ---------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="what to measure (default: all)")
    add("--steps", type=int, default=BOWL_STEPS, help=f"at most so many steps of training (default: {BOWL_STEPS})")
    add("--rounds", type=int, default=40, help="of the timing (default: 40)")
    folder = Path(__file__).parent / "results" / "meta_options"
    add("--out", type=Path, default=folder, metavar="DIR", help=f"(default: {folder})")
    options = parser.parse_args(arguments)
    if min(options.steps, options.rounds) < 1:
        parser.error("--steps and --rounds must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)  # small tasks, which gain nothing from more
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "meta_options.csv")
    stages: dict[str, Callable[[], None]] = {
        "state": lambda: measure_state(results),
        "digits": lambda: measure_digits(results, min(DIGITS_STEPS, options.steps)),
        "bowl": lambda: measure_bowl(results, options.steps),
        "time": lambda: measure_time(results, options.rounds),
    }
    command = f"python -m benchmarks.meta_options --steps {options.steps} --rounds {options.rounds}"
    for stage in STAGES:
        if stage in options.stages:
            stages[stage]()
            (options.out / "meta_options.md").write_text(markdown(results, command))
    print(f"\n{markdown(results, command)}\nIn {options.out}.")


if __name__ == "__main__":
    main()
