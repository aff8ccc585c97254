"""The paper's hyperparameter search: a genetic one over normal distributions, as an Optuna sampler."""

import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from examples.paper.experiments import Generation
from examples.paper.optimizers import Hyperparameter

SPAN = 40.0  # half of the width of the genetic search's space: e^40 either way bounds nothing in practice
OTHER_SPAN = 7.0  # the same for Optuna's other samplers, whose space is what they search: three orders of magnitude
LEASE_SECONDS = 180.0  # a trial whose worker gave no sign of life for so long is taken to be lost
WAIT_SECONDS = 0.3

Score = Callable[[Mapping[str, float], Generation, int, Callable[[], None]], float]
"""What is minimised: called with the hyperparameters, the generation, its number, and a function that renews the lease.

The number is meant for the seed: runs of one generation on the same noise differ by their hyperparameters alone.
"""


class GeneticSampler(BaseSampler):
    """Samples each generation around the mean of the better half of the last one (section 4 of the paper's appendix).

    In the normalised space, every coordinate is drawn from a normal distribution around the mean, with the generation's
    standard deviation. The first mean is given. Runs that diverged are never averaged.

    Args:
        start: the first mean, by parameter name.
        schedule: the generations. A study that has completed them all is sampled around its last mean.
        population: the trials of each.
        seed: of the draws; each follows from it, the study's name and the trial's number.

    Attributes:
        generation: the one to sample for; None: the first that is not complete. Where several workers ask, another one
            may complete it in between.
    """

    def __init__(
        self, start: Mapping[str, float], schedule: Sequence[Generation], population: int, seed: int = 0
    ) -> None:
        self.start, self.schedule, self.population, self.seed = dict(start), tuple(schedule), population, seed
        self.generation: int | None = None

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}  # it is only known to the caller of `ask`, who gives it there

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, float]:
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> float:
        assert isinstance(param_distribution, FloatDistribution)
        number = current_generation(study, self.population) if self.generation is None else self.generation
        number = min(number, len(self.schedule) - 1)
        center = self.mean(study, number)[param_name]
        source = zlib.crc32(f"{study.study_name}/{param_name}".encode())
        draw = np.random.default_rng([self.seed, source, trial.number]).standard_normal()
        return float(
            np.clip(center + self.schedule[number].std * draw, param_distribution.low, param_distribution.high)
        )

    def mean(self, study: optuna.Study, generation: int) -> dict[str, float]:
        """Where `generation` (0 is the first) is drawn around: the average of the better half of the one before."""
        for number in range(generation - 1, -1, -1):
            trials = [trial for trial in completed(study, number)[: self.population] if math.isfinite(_value(trial))]
            best = sorted(trials, key=_value)[: max(1, self.population // 2)]
            if best:
                return {name: float(np.mean([trial.params[name] for trial in best])) for name in self.start}
        return dict(self.start)


def space(hyperparameters: Mapping[str, Hyperparameter], span: float) -> dict[str, FloatDistribution]:
    """The normalised space, `span` to either side of the defaults; a decay ends at 0, which is the decay 0."""
    bounds = {}
    for name, each in hyperparameters.items():
        center = each.normalise(each.default)
        bounds[name] = FloatDistribution(center - span, 0.0 if each.kind == "decay" else center + span)
    return bounds


def completed(study: optuna.Study, generation: int) -> list[FrozenTrial]:
    """The finished trials of a generation, by number."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [trial for trial in trials if trial.user_attrs.get("generation") == generation]


def current_generation(study: optuna.Study, population: int) -> int:
    """The first generation that is not complete."""
    number = 0
    while len(completed(study, number)) >= population:
        number += 1
    return number


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value


def open_storage(location: str) -> optuna.storages.BaseStorage:
    """Optuna's storage for a database URL, or for a journal file, which machines can share over a file system."""
    if "://" in location:
        return optuna.storages.RDBStorage(location)
    Path(location).parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(location))


class Search:
    """The search for one optimizer's hyperparameters; any number of workers may hold one on the same study.

    Args:
        name: of the study.
        hyperparameters: what is tuned.
        sampler: None for the genetic search, or one of Optuna's, which makes as many trials, all of them as long as
            those of the last generation.

        options: of the task; kept with the study, as its trials hold for these alone.

    Raises:
        ValueError: population below 2, no generation, or a study of that name that was begun with others.
    """

    def __init__(
        self,
        name: str,
        storage: optuna.storages.BaseStorage,
        hyperparameters: Mapping[str, Hyperparameter],
        schedule: Sequence[Generation],
        population: int,
        sampler: BaseSampler | None = None,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if population < 2:
            raise ValueError(f"population must be at least 2, of which the better half is averaged, got {population}")
        if not schedule:
            raise ValueError("schedule must hold at least one generation, got none")
        if sampler is not None:
            schedule, population = schedule[-1:], population * len(schedule)
        self.hyperparameters, self.schedule, self.population = hyperparameters, tuple(schedule), population
        self.plan = {"population": population, "schedule": [[each.std, each.steps] for each in schedule]}
        self.plan |= {"options": dict(options)} if options else {}
        self.start = {key: each.normalise(each.default) for key, each in hyperparameters.items()}
        self.genetic = GeneticSampler(self.start, self.schedule, population, seed)
        self.is_genetic = sampler is None
        self.study = optuna.create_study(
            storage=storage, study_name=name, sampler=sampler or self.genetic, load_if_exists=True
        )
        self._check_plan()

    def _check_plan(self) -> None:
        """Writes the plan into a new study; trials of two plans must not be mixed."""
        begun = self.study.user_attrs.get("plan")
        if begun is None:
            self.study.set_user_attr("plan", self.plan)
        elif begun != self.plan:
            raise ValueError(
                f"the study {self.study.study_name!r} was begun with {begun}, got {self.plan}: go on with the "
                "former, or use another storage"
            )

    def is_done(self) -> bool:
        return current_generation(self.study, self.population) >= len(self.schedule)

    def trials_done(self) -> int:
        return sum(min(self.population, len(completed(self.study, number))) for number in range(len(self.schedule)))

    def try_one(self, score: Score) -> bool:
        """Runs one trial if the present generation still wants one; returns whether it did.

        It does not want one where all its trials are taken by workers that are alive: another search can go on then.
        """
        number = current_generation(self.study, self.population)
        if number >= len(self.schedule) or len(completed(self.study, number)) + self._running() >= self.population:
            return False
        span = SPAN if self.is_genetic else OTHER_SPAN
        self.genetic.generation = number
        trial = self.study.ask(dict(space(self.hyperparameters, span)))
        trial.set_user_attr("generation", number)
        trial.set_user_attr("steps", self.schedule[number].steps)
        self._renew(trial)
        last = time.monotonic()

        def renew() -> None:
            nonlocal last
            if time.monotonic() - last > LEASE_SECONDS / 6:
                self._renew(trial)
                last = time.monotonic()

        try:
            value = score(self.denormalise(trial.params), self.schedule[number], number, renew)
        except UpdateFinishedTrialError:  # out of `renew`: the lease ran out, another worker has the trial's place
            return True
        except BaseException:
            self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            raise
        self.study.tell(trial, value if math.isfinite(value) else math.inf, skip_if_finished=True)
        return True

    def _renew(self, trial: optuna.Trial) -> None:
        trial.set_user_attr("lease", datetime.now(UTC).timestamp() + LEASE_SECONDS)

    def _running(self) -> int:
        """How many trials have a living worker. Those whose lease has run out end as failed, and are made again."""
        now, alive = datetime.now(UTC).timestamp(), 0
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            started = trial.datetime_start.timestamp() if trial.datetime_start else now
            if trial.user_attrs.get("lease", started + LEASE_SECONDS) >= now:
                alive += 1
            else:
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        return alive

    def denormalise(self, positions: Mapping[str, float]) -> dict[str, float]:
        return {name: each.denormalise(positions[name]) for name, each in self.hyperparameters.items()}

    def best(self) -> dict[str, float]:
        """The tuned hyperparameters: of the genetic search the mean that its last generation leaves, else of the best
        trial.

        Raises:
            RuntimeError: the search is not done.
        """
        if not self.is_done():
            raise RuntimeError(
                f"the search {self.study.study_name!r} is not done: {self.trials_done()} trials of "
                f"{self.population * len(self.schedule)}"
            )
        if self.is_genetic:
            return self.denormalise(self.genetic.mean(self.study, len(self.schedule)))
        last = completed(self.study, len(self.schedule) - 1)
        return self.denormalise(min(last, key=_value).params)


def work(searches: Sequence[Search], scores: Sequence[Score]) -> None:
    """Takes trials of `searches` until all are done: the loop of one worker."""
    while True:
        busy = [search.try_one(score) for search, score in zip(searches, scores, strict=True)]
        if all(search.is_done() for search in searches):
            return
        if not any(busy):
            time.sleep(WAIT_SECONDS)
