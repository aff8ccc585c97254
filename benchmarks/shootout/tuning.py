"""The searches: a scan of the learning rate with each schedule, the other choices, then Optuna's Gaussian process, and
a scan of the weight decay.

A search has no state but its records. Trial k follows from the trials before it and from k alone, so a search that
was killed goes on exactly as if it had not been. Where a task has held-out data there are two aims, the final training
loss and the final validation loss: the process models both, and the best setting by either is kept.
"""

import math
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from benchmarks.shootout.problem import VALIDATION
from benchmarks.shootout.running import DIVERGED, Record, score_of
from benchmarks.shootout.spaces import HALF_DECADE, Choice, Range, Space, defaults, grid, widen

EXTENSIONS = 6  # further learning rates that the scan may try beyond its range with the first schedule
OTHER_EXTENSIONS = 3  # and with another one, where they are a decade apart, not half of one
DECADE = 10.0  # on either side of the best learning rates, where the rest of the search has its own range
WIDENINGS, WIDENED_TRIALS = 3, 5  # how often ranges are widened when a search is done, and the trials of each time
DECAYS = 4  # weight decays of the last scan, half a decade apart up to the range's end
TINY = 1e-300

Setting = dict[str, Any]


@dataclass(frozen=True)
class Search:
    """What the trials of a search follow from.

    Attributes:
        task, contender: their names.
        aims: what is to be minimised.
        count: of the trials, before the scan or a range is widened.
        afterwards: options that are tried on top of the best settings at the end.
        widens: the scan and the ranges go further where the best is at an end, and weight decay is scanned; not when
            somebody tries things out.
    """

    task: str
    contender: str
    space: Space
    aims: Sequence[str]
    count: int
    afterwards: Mapping[str, Any] = field(default_factory=dict)
    widens: bool = True

    def next_setting(self, done: Sequence[Record]) -> Setting | None:
        """The setting of the trial after these; None: the search is done."""
        scan = self._scanned(done)
        others = [
            {name: option}
            for name, each in self.space.items()
            if isinstance(each, Choice) and name != "schedule"
            for option in each.options[1:]
        ]
        number = len(done)
        if number < self._budget(scan) and number < len(scan):
            return defaults(self.space) | scan[number]
        if number < self._budget(scan) and number < len(scan) + len(others):
            return self.best(done)[0] | others[number - len(scan)]
        space, wanted, at_last = self._end(done, scan)
        if number < wanted:
            return suggest(space, self.aims, done, zlib.crc32(f"{self.task}/{self.contender}/{number}".encode()))
        return at_last[number - wanted] if number - wanted < len(at_last) else None

    def is_done(self, done: Sequence[Record]) -> bool:
        """Whether `next_setting` would be None, without asking the process."""
        _, wanted, at_last = self._end(done, self._scanned(done))
        return len(done) >= wanted + len(at_last)

    def _budget(self, scan: Sequence[Setting]) -> int:
        """The trials before a range is widened: learning rates beyond the scan's range come on top."""
        return self.count + max(0, len(scan) - self._unextended())

    def _unextended(self) -> int:
        rates = grid(self._rate())
        return len(rates) + (len(self._schedules()) - 1) * len(rates[::2])

    def _schedules(self) -> tuple[str | None, ...]:
        """None alone where there is no choice."""
        schedule = self.space.get("schedule")
        return schedule.options if isinstance(schedule, Choice) else (None,)

    def best(self, done: Sequence[Record]) -> list[Setting]:
        """The best settings, by each aim; one where they are the same."""
        leaders = [min(done, key=partial(score_of, aim=aim)) for aim in self.aims]
        found = [setting_of(record, self.space) for record in leaders]
        return [setting for number, setting in enumerate(found) if setting not in found[:number]]

    def _rate(self) -> Range:
        rate = self.space["lr"]
        assert isinstance(rate, Range)
        return rate

    def _scanned(self, done: Sequence[Record]) -> list[Setting]:
        """Learning rates, with their schedule: for the first one all those of the range, for another every second one,
        and beyond as long as the best is at the end."""
        found: list[Setting] = []
        for schedule in self._schedules():
            is_first = not found
            rates, ratio = grid(self._rate())[:: 1 if is_first else 2], HALF_DECADE if is_first else DECADE
            most = len(rates) + (EXTENSIONS if is_first else OTHER_EXTENSIONS) if self.widens else 0
            own = done[len(found) :]
            while len(rates) <= len(own) and len(rates) < most:
                best = {setting["lr"] for setting in self.best(own[: len(rates)])}
                if max(rates) in best:
                    rates.append(max(rates) * ratio)
                elif min(rates) in best:
                    rates.append(min(rates) / ratio)
                else:
                    break
            found += [{"lr": rate} | ({} if schedule is None else {"schedule": schedule}) for rate in rates]
            if len(own) < len(rates):
                break  # how many there are with this schedule is not known yet
        return found

    def _end(self, done: Sequence[Record], scan: Sequence[Setting]) -> tuple[Space, int, list[Setting]]:
        """The ranges after the scan, wider where a best setting stands at an end after all trials; the number of
        trials; and the settings that are tried after these."""
        if not done:
            return self.space, self.count, []
        scanned = done[: len(scan)]
        best = [
            setting["lr"]
            for schedule in {record["job"]["schedule"] for record in scanned}
            for setting in self.best([record for record in scanned if record["job"]["schedule"] == schedule])
        ]
        rate = replace(self._rate(), low=min(best) / DECADE, high=max(best) * DECADE)
        space, wanted = {**self.space, "lr": rate}, self._budget(scan)
        for _ in range(WIDENINGS if self.widens else 0):
            wider = widen(space, self.best(done[:wanted])) if len(done) >= wanted else None
            if wider is None:
                break
            space, wanted = dict(wider), wanted + WIDENED_TRIALS
        return space, wanted, self._at_last(done, wanted) if len(done) >= wanted else []

    def _at_last(self, done: Sequence[Record], wanted: int) -> list[Setting]:
        """Weight decays, on top of what validates best after the trials `wanted`: the process, which starts without
        any and shares its trials between the aims, seldom finds its way there. Then what is tried afterwards."""
        found: list[Setting] = []
        decay = self.space.get("weight_decay")
        if self.widens and isinstance(decay, Range) and VALIDATION in self.aims:
            best = setting_of(min(done[:wanted], key=partial(score_of, aim=VALIDATION)), self.space)
            found = [best | {"weight_decay": decay.high / HALF_DECADE**number} for number in reversed(range(DECAYS))]
        so_far = wanted + len(found)
        if self.afterwards and len(done) >= so_far:
            found += [best | dict(self.afterwards) for best in self.best(done[:so_far])]
        return found


def setting_of(record: Record, space: Space) -> Setting:
    """What of a trial is searched."""
    job = record["job"]
    return {name: job["schedule"] if name == "schedule" else job["hyperparameters"][name] for name in space}


def suggest(space: Space, aims: Sequence[str], done: Sequence[Record], seed: int) -> Setting:
    """A setting from a Gaussian process of the logarithms of the losses, which in as few trials as here ends far closer
    to the best of a smooth function of some five variables than Optuna's default, a Parzen estimator."""
    import optuna  # only where something is tuned
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions: dict[str, BaseDistribution] = {
        name: FloatDistribution(each.low, each.high, log=True)
        if isinstance(each, Range)
        else CategoricalDistribution(each.options)
        for name, each in space.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=1)
    study = optuna.create_study(sampler=sampler, directions=["minimize"] * len(aims))
    for record in done:
        setting = setting_of(record, space)
        if not all(each.has(setting[name]) for name, each in space.items() if isinstance(each, Range)):
            continue  # of the scan, far away
        params = {
            name: each.position(setting[name]) if isinstance(each, Range) else setting[name]
            for name, each in space.items()
        }
        values = [_logarithm(record, aim) for aim in aims]
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, values=values))
    found = study.ask(distributions).params
    return {name: each.value(found[name]) if isinstance(each, Range) else found[name] for name, each in space.items()}


def _logarithm(record: Record, aim: str) -> float:
    """Of a loss; where the run diverged that of the highest loss that does not count as diverged."""
    highest = math.log(DIVERGED * record["idle_loss"])
    loss = score_of(record, aim)
    return min(math.log(max(loss, TINY)), highest) if math.isfinite(loss) else highest
