"""The genetic search: its statistics, its optimum, several workers, kills."""

import math
import multiprocessing
import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from examples.paper import search as module
from examples.paper.experiments import BOWL, Generation
from examples.paper.optimizers import Hyperparameter
from examples.paper.search import Search, completed, open_storage, work

SPACE = {"lr": Hyperparameter(1e-3), "momentum": Hyperparameter(0.9, "decay")}
SCHEDULE = [Generation(3.0, 10), Generation(2.0, 10), Generation(1.0, 10), Generation(0.5, 10), Generation(0.3, 10)]
OPTIMUM = {"lr": 0.2, "momentum": 0.99}


@pytest.fixture(autouse=True)
def _quiet():
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def make(storage, population=32, schedule=SCHEDULE, **options):
    return Search("synthetic", storage, SPACE, schedule, population, **options)


def bowl_score(hyperparameters, generation, number, renew):
    """Least at OPTIMUM, in the normalised space; as badly scaled as real hyperparameters, and noisy."""
    renew()
    if hyperparameters["lr"] > 1:
        return math.nan
    distances = [
        SPACE[name].normalise(max(value, 1e-30)) - SPACE[name].normalise(OPTIMUM[name])
        for name, value in hyperparameters.items()
    ]
    return distances[0] ** 2 + distances[1] ** 2 + 0.01 * np.sin(1e6 * hyperparameters["lr"])


def slow_score(folder, hyperparameters, generation, number, renew):
    (folder / f"{os.getpid()}-{time.monotonic_ns()}").touch()
    time.sleep(0.05)
    return bowl_score(hyperparameters, generation, number, renew)


def worker(location, folder, population):
    module.LEASE_SECONDS = 2.0  # of a worker that was killed, the others wait for the end of it
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    work([make(open_storage(location), population)], [partial(slow_score, folder)])


@pytest.mark.parametrize(
    ("hyperparameter", "value", "position"),
    [(Hyperparameter(1.0), 0.1, math.log(0.1)), (Hyperparameter(0.9, "decay"), 0.9, math.log(0.1))],
)
def test_normalised_space(hyperparameter, value, position):
    assert hyperparameter.normalise(value) == pytest.approx(position)
    assert hyperparameter.denormalise(position) == pytest.approx(value)


def test_decay_cannot_be_negative():
    assert Hyperparameter(0.9, "decay").denormalise(2.0) == 0.0


def test_finds_a_known_optimum():
    search = make(optuna.storages.InMemoryStorage(), schedule=BOWL.schedule)
    work([search], [bowl_score])
    best = search.best()
    assert best["lr"] == pytest.approx(OPTIMUM["lr"], rel=0.2)
    assert 1 - best["momentum"] == pytest.approx(1 - OPTIMUM["momentum"], rel=0.4)


def test_generations_have_the_schedules_mean_and_deviation():
    search = make(optuna.storages.InMemoryStorage(), population=400, schedule=SCHEDULE[:2])
    work([search], [bowl_score])
    first, second = ([trial.params["lr"] for trial in completed(search.study, number)] for number in (0, 1))
    assert np.mean(first) == pytest.approx(math.log(1e-3), abs=3 * 3.0 / 20)
    assert np.std(first) == pytest.approx(3.0, rel=0.15)
    trials = sorted(completed(search.study, 0), key=lambda trial: trial.value)
    assert np.mean(second) == pytest.approx(np.mean([trial.params["lr"] for trial in trials[:200]]), abs=3 * 2.0 / 20)
    assert np.std(second) == pytest.approx(2.0, rel=0.15)


def test_non_finite_scores_are_worst_and_kept():
    search = make(optuna.storages.InMemoryStorage(), population=64, schedule=SCHEDULE[:1])
    work([search], [lambda hyperparameters, *_: math.nan if hyperparameters["lr"] > 0.01 else 1.0])
    lost = [trial for trial in completed(search.study, 0) if math.exp(trial.params["lr"]) > 0.01]
    assert lost
    assert all(trial.value == math.inf for trial in lost)


def test_diverged_runs_are_never_averaged():
    """Where less than half of a generation is finite, those alone count; where none is, the mean stays."""
    search = make(optuna.storages.InMemoryStorage(), population=16, schedule=SCHEDULE[:2])
    limit = math.exp(search.start["lr"] - 1.5)
    work([search], [lambda hyperparameters, *_: 1.0 if hyperparameters["lr"] < limit else math.nan])
    finite = [trial.params["lr"] for trial in completed(search.study, 0) if math.isfinite(trial.value)]
    assert 1 <= len(finite) < 8
    assert search.genetic.mean(search.study, 1)["lr"] == pytest.approx(np.mean(finite))
    hopeless = make(optuna.storages.InMemoryStorage(), population=4, schedule=SCHEDULE[:2])
    work([hopeless], [lambda *_: math.nan])
    assert hopeless.best() == {name: pytest.approx(each.default) for name, each in SPACE.items()}


def test_another_plan_is_refused(tmp_path):
    location = str(tmp_path / "search.journal")
    make(open_storage(location), population=4)
    with pytest.raises(ValueError, match="was begun with"):
        make(open_storage(location), population=8)


def test_steps_and_generations_reach_the_score():
    seen = []
    search = make(optuna.storages.InMemoryStorage(), population=2)
    work(
        [search],
        [lambda h, generation, number, renew: seen.append(generation) or bowl_score(h, generation, number, renew)],
    )
    assert seen == [generation for generation in SCHEDULE for _ in range(2)]


def test_resumes_where_it_was_cut_off(tmp_path):
    class StopError(Exception):
        pass

    left = 41

    def fragile(hyperparameters, generation, number, renew):
        nonlocal left
        left -= 1
        if left < 0:
            raise StopError
        return bowl_score(hyperparameters, generation, number, renew)

    def counted(*arguments):
        nonlocal made
        made += 1
        return bowl_score(*arguments)

    location = str(tmp_path / "search.journal")
    with pytest.raises(StopError):
        work([make(open_storage(location), schedule=BOWL.schedule)], [fragile])
    again, made = make(open_storage(location), schedule=BOWL.schedule), 0
    assert again.trials_done() == 41
    kept = [trial.params for trial in completed(again.study, 0)]
    work([again], [counted])
    assert made == 32 * 10 - 41
    assert [trial.params for trial in completed(again.study, 0)] == kept
    assert again.best()["lr"] == pytest.approx(OPTIMUM["lr"], rel=0.2)


def test_a_killed_workers_trial_is_made_again(tmp_path):
    """Two processes share one study; one is killed in the middle, and the other ends the search without it."""
    location = str(tmp_path / "search.journal")
    context = multiprocessing.get_context("spawn")
    victim, survivor = (context.Process(target=worker, args=(location, tmp_path, 8)) for _ in range(2))
    victim.start()
    survivor.start()
    while len(list(tmp_path.glob(f"{victim.pid}-*"))) < 3:
        assert victim.is_alive()
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    survivor.join(timeout=60)
    assert survivor.exitcode == 0
    search = make(open_storage(location), 8)
    assert search.trials_done() == 8 * len(SCHEDULE)
    assert search.is_done()


def test_a_lost_trials_lease_runs_out():
    search = make(optuna.storages.InMemoryStorage(), population=2, schedule=SCHEDULE[:1])
    lost = search.study.ask(module.space(SPACE, 1.0))
    lost.set_user_attr("generation", 0)
    lost.set_user_attr("lease", time.time() + 0.2)
    assert search.try_one(bowl_score)
    assert not search.try_one(bowl_score), "the lost trial still counts as running"
    time.sleep(0.3)
    assert search.try_one(bowl_score)
    assert search.is_done()


@pytest.mark.parametrize("sampler", [optuna.samplers.TPESampler(seed=0), optuna.samplers.RandomSampler(seed=0)])
def test_other_samplers_run_the_same_budget(sampler):
    search = make(optuna.storages.InMemoryStorage(), population=4, sampler=sampler)
    work([search], [bowl_score])
    assert search.trials_done() == 4 * len(SCHEDULE)
    trials = search.study.get_trials(states=(TrialState.COMPLETE,))
    assert all(trial.user_attrs["steps"] == SCHEDULE[-1].steps for trial in trials)
    best = min(trials, key=lambda trial: trial.value)
    assert search.best() == search.denormalise(best.params)


def test_best_before_the_end_is_refused():
    with pytest.raises(RuntimeError, match="0 trials of 160"):
        make(optuna.storages.InMemoryStorage()).best()


@pytest.mark.parametrize(("population", "schedule", "match"), [(1, SCHEDULE, "population"), (4, [], "schedule")])
def test_bad_arguments(population, schedule, match):
    with pytest.raises(ValueError, match=match):
        make(optuna.storages.InMemoryStorage(), population, schedule)


def test_database_storage(tmp_path: Path):
    storage = open_storage(f"sqlite:///{tmp_path / 'search.db'}")
    work([make(storage, 4, SCHEDULE[:2])], [bowl_score])
    assert make(storage, 4, SCHEDULE[:2]).is_done()
