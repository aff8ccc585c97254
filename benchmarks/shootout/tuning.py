"""The searches: a scan of the learning rate, the other choices one by one, then Optuna's Parzen estimator.

A search has no state but its records. Trial k follows from the trials before it and from k alone, so a search that
was killed goes on exactly as if it had not been. Where a task has held-out data there are two aims, the final training
loss and the final validation loss: the estimator minimises both, and the best setting by either is kept.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.shootout.running import DIVERGED, Record, score_of
from benchmarks.shootout.spaces import HALF_DECADE, Choice, Range, Space, defaults, grid, widen

EXTENSIONS = 6  # further learning rates that a scan may try beyond its range
DECADE = 10.0  # on either side of the best learning rates, where the rest of the search has its own range
WIDENINGS, WIDENED_TRIALS = 3, 5  # how often ranges are widened when a search is done, and the trials of each time
TINY = 1e-300

Setting = dict[str, Any]


@dataclass(frozen=True)
class Search:
    """What the trials of a search follow from.

    Attributes:
        task, contender: their names.
        aims: what is to be minimised.
        count: of the trials, before anything is widened.
        afterwards: options that are tried on top of the best settings at the end.
        widens: the scan and the ranges go further where the best is at an end; not when somebody tries things out.
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
        rates = self._scanned(done)
        others = [
            {name: option}
            for name, each in self.space.items()
            if isinstance(each, Choice)
            for option in each.options[1:]
        ]
        number = len(done)
        if number < self.count and number < len(rates):
            return defaults(self.space) | {"lr": rates[number]}
        if number < self.count and number < len(rates) + len(others):
            return self.best(done)[0] | others[number - len(rates)]
        space, wanted = self._widened(done, len(rates))
        if number < wanted:
            return suggest(space, self.aims, done, zlib.crc32(f"{self.task}/{self.contender}/{number}".encode()))
        at_last = self._at_last(done[:wanted])
        return at_last[number - wanted] if number - wanted < len(at_last) else None

    def is_done(self, done: Sequence[Record]) -> bool:
        """Whether `next_setting` would be None, without asking the estimator."""
        if len(done) < self.count:
            return False
        wanted = self._widened(done, len(self._scanned(done)))[1]
        return len(done) >= wanted and len(done) >= wanted + len(self._at_last(done[:wanted]))

    def best(self, done: Sequence[Record]) -> list[Setting]:
        """The best settings, by each aim; one where they are the same."""
        leaders = [min(done, key=lambda record, aim=aim: score_of(record, aim)) for aim in self.aims]  # type: ignore[misc]
        found = [setting_of(record, self.space) for record in leaders]
        return [setting for number, setting in enumerate(found) if setting not in found[:number]]

    def _rate(self) -> Range:
        rate = self.space["lr"]
        assert isinstance(rate, Range)
        return rate

    def _scanned(self, done: Sequence[Record]) -> list[float]:
        """The learning rates of the scan: those of the range, and beyond as long as the best one is at the end."""
        rates = grid(self._rate())
        most = min(len(rates) + EXTENSIONS, self.count) if self.widens else 0
        while len(rates) <= len(done) and len(rates) < most:
            best = {setting["lr"] for setting in self.best(done[: len(rates)])}
            if max(rates) in best:
                rates.append(max(rates) * HALF_DECADE)
            elif min(rates) in best:
                rates.append(min(rates) / HALF_DECADE)
            else:
                break
        return rates

    def _widened(self, done: Sequence[Record], scanned: int) -> tuple[Space, int]:
        """The ranges after the scan, wider where a best setting stands at an end after all trials, and the number of
        trials in all."""
        if not done:
            return self.space, self.count
        best = [setting["lr"] for setting in self.best(done[:scanned])]
        rate = replace(self._rate(), low=min(best) / DECADE, high=max(best) * DECADE)
        space, wanted = {**self.space, "lr": rate}, self.count
        for _ in range(WIDENINGS if self.widens else 0):
            wider = widen(space, self.best(done[:wanted])) if len(done) >= wanted else None
            if wider is None:
                break
            space, wanted = dict(wider), wanted + WIDENED_TRIALS
        return space, wanted

    def _at_last(self, done: Sequence[Record]) -> list[Setting]:
        return [setting | dict(self.afterwards) for setting in self.best(done)] if self.afterwards else []


def setting_of(record: Record, space: Space) -> Setting:
    """What of a trial is searched."""
    job = record["job"]
    return {name: job["schedule"] if name == "schedule" else job["hyperparameters"][name] for name in space}


def suggest(space: Space, aims: Sequence[str], done: Sequence[Record], seed: int) -> Setting:
    """A setting from the estimator, whose aims are the logarithms of the losses."""
    import optuna  # only where something is tuned
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions: dict[str, BaseDistribution] = {
        name: FloatDistribution(each.low, each.high, log=True)
        if isinstance(each, Range)
        else CategoricalDistribution(each.options)
        for name, each in space.items()
    }
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=1)
    study = optuna.create_study(sampler=sampler, directions=["minimize"] * len(aims))
    for record in done:
        setting = setting_of(record, space)
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
