"""The paper's reports: figures against ones computed here, pictures, partial results, what a person adds."""

import itertools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from examples.paper import pictures
from examples.paper.experiments import BOWL, CLASSIFICATION, EXPERIMENTS, ROSENBROCK, Experiment
from examples.paper.optimizers import OPTIMIZERS
from examples.paper.records import latest, number, plus_minus
from examples.paper.report import write_report
from examples.paper.runs import BINS, FORMAT, Job, Result, append_result
from examples.paper.tasks import NoisyBowl

STEPS = 2000
SEEDS = (0, 1, 2)
FLOOR = NoisyBowl(0).floor
# Final loss and steps per second of the synthetic runs.
BOWL_SPEED = {"LODO": (11.0, 80.0), "Adam": (15.5, 400.0), "SGD": (18.0, 500.0), "LODO-Diagonal": (16.0, 90.0)}
SEARCH = {"sampler": "genetic", "population": 8, "schedule": [[3.0, 100], [1.0, 500]]}
Shape = Callable[[np.ndarray], np.ndarray]


def make_job(experiment: Experiment, optimizer: str, seed: int, **changes: Any) -> Job:
    job = Job(
        experiment=experiment.name,
        part="main",
        label=optimizer,
        task=experiment.task,
        optimizer=optimizer,
        hyperparameters={"lr": 0.012345678, "beta": 0.9},
        seed=seed,
        steps=STEPS,
    )
    return replace(job, **changes)


def make_result(job: Job, shape: Shape, rate: float, diverged_at: int | None = None, **more: Any) -> Result:
    """A run whose loss after the fraction t of its steps is shape(t), with some noise."""
    rng = np.random.default_rng([job.seed, len(job.optimizer)])
    speed = rate * (1 + 0.05 * job.seed)
    last = diverged_at or job.steps
    width = max(1, -(-job.steps // BINS))
    step = np.append(np.arange(width, last, width), last)
    noise = 0.0 if job.task == "rosenbrock" else 0.03
    loss = shape(step / job.steps) * (1 + noise * rng.standard_normal(len(step)))
    if diverged_at:
        step, loss = step[:-1], loss[:-1]
    return {
        "format": FORMAT,
        "key": job.key,
        "job": asdict(job),
        "status": "diverged" if diverged_at else "finished",
        "diverged_at": diverged_at,
        "final_loss": None if diverged_at else float(loss[step > 0.9 * job.steps].mean()),
        "seconds": last / speed,
        "setup_seconds": 0.01,
        "steps_per_second": speed,
        "curve": {"step": step.tolist(), "seconds": (step / speed).tolist(), "loss": loss.tolist()},
        "validation": {},
        "test": {},
        "skipped_steps": 0,
        "hessian_error": {},
        "trajectory": [],
        "started": f"2026-01-0{job.seed + 1}T00:00:00+00:00",
        "environment": {
            "lodo": "0.1.0",
            "torch": "2.11.0",
            "numpy": "2.0.0",
            "python": "3.11.0",
            "system": "Linux",
            "device": "cpu",
            "device_name": "x86_64",
            "threads": 1,
            "workers": 1,
            "load": 0.5,
        },
    } | more


def tracking(final: float) -> Shape:
    """A loss that rises from 0 and falls to `final`."""
    return lambda t: final * (1 - np.exp(-60 * t)) * (1 + 1.5 * np.exp(-5 * t))


def falling(start: float, final: float, speed: float = 6.0) -> Shape:
    return lambda t: final + (start - final) * np.exp(-speed * t)


def hessian(seed: int) -> dict[str, list[float]]:
    steps = np.arange(100, STEPS + 1, 100)
    return {"step": steps.tolist(), "value": ((steps / 50.0) ** -0.3 * (1 + 0.05 * seed)).tolist()}


def bowl_results(seeds: tuple[int, ...] = SEEDS) -> list[Result]:
    """Four optimizers of the bowl; SGD's run at seed 2 diverged."""
    return [
        make_result(
            make_job(BOWL, name, seed, hessian_every=100),
            tracking(final),
            rate,
            diverged_at=700 if (name, seed) == ("SGD", 2) else None,
            hessian_error=hessian(seed) if name.startswith("LODO") else {},
        )
        for seed, (name, (final, rate)) in itertools.product(seeds, BOWL_SPEED.items())
    ]


def sweep_results() -> list[Result]:
    """The noise sweep, whose loss is 1.5 floors, and two others; the largest depth always diverged."""
    results = []
    for seed, sweep in itertools.product(SEEDS, BOWL.sweeps):
        if sweep.name in ("beta", "block size"):
            continue
        for point in sweep.points:
            noise = float(point.task_options.get("noise", 1.0))
            job = make_job(
                BOWL,
                point.optimizer,
                seed,
                part=sweep.name,
                label=f"{sweep.name} {point.value:g}",
                value=point.value,
                steps=STEPS // 2,
                task_options=point.task_options,
            )
            failed = point.value == 24 or (point.value == 16 and seed == 0)
            results.append(make_result(job, tracking(1.5 * FLOOR * noise**2), 800.0, 300 if failed else None))
    return results


def rosenbrock_results() -> list[Result]:
    results = []
    for name, final, bend in (("LODO", 1e-7, 0.2), ("Adam", 1e-4, -0.3), ("SGD", 3e-3, 0.5), ("Yogi", 1e-2, 0.9)):
        for seed in SEEDS:
            t = np.linspace(0, 1, 200)
            x, y = -0.5 + 1.5 * t**bend if bend > 0 else -0.5 + 1.5 * t, 2 - t + bend * np.sin(np.pi * t)
            ways = np.stack([x, y], axis=1).tolist()
            job = make_job(ROSENBROCK, name, seed, steps=200, trajectory=True)
            results.append(make_result(job, falling(3.0, final, 20.0), 3000.0, trajectory=ways))
    return results


def image_results() -> list[Result]:
    """Three optimizers that validate; all runs of LARS diverged before the first bin of the curve was full."""
    results = []
    for seed, (name, final) in itertools.product(SEEDS, (("LODO", 0.4), ("Adam", 0.45), ("LARS", 1.0))):
        job = make_job(CLASSIFICATION, name, seed, validate_every=100, task_options={"batch_size": 64})
        steps = np.arange(100, STEPS + 1, 100)
        validated = {
            "step": steps.tolist(),
            "seconds": (steps / 100).tolist(),
            "test_loss": falling(2.3, final + 0.1 + 0.01 * seed)(steps / STEPS).tolist(),
            "test_accuracy": falling(0.1, 1 - final / 2 - 0.01 * seed)(steps / STEPS).tolist(),
        }
        failed = name == "LARS"
        results.append(
            make_result(job, falling(2.4, final), 100.0, 5 if failed else None, validation={} if failed else validated)
        )
    return results


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the pictures, but leaves out the slow part, their drawing."""
    monkeypatch.setattr(pictures, "write", lambda figure, path: path)


def store(results: list[Result], out: Path) -> Path:
    for result in results:
        append_result(out / "runs.jsonl", result)
    return out


def report(experiment: Experiment, out: Path) -> str:
    return write_report(experiment, out).read_text(encoding="utf-8")


def table_row(text: str, name: str, heading: str) -> dict[str, str]:
    """The row that starts with `name` in the first table after `heading`, by column."""
    table = text.split(f"{heading}\n", 1)[1]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", table, re.M)]
    row = next(row for row in cells if row[0] == name)
    return dict(zip(cells[0], row, strict=True))


def of(results: list[Result], name: str) -> list[Result]:
    return [result for result in results if result["job"]["label"] == name and result["status"] == "finished"]


def assert_pictures(text: str, out: Path, names: set[str]) -> None:
    """The report links exactly these pictures, and they are small, real ones."""
    assert set(re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)) == names
    for name in names:
        assert 3_000 < (out / name).stat().st_size < 150_000, name
        image = imread(out / name)
        assert min(image.shape[:2]) > 200
        assert image[..., :3].std() > 0.01


@pytest.fixture(scope="module")
def bowl(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, list[Result]]:
    out = tmp_path_factory.mktemp("bowl")
    results = bowl_results() + sweep_results()
    store(results, out)
    (out / "tuned.json").write_text(json.dumps({"LODO": {"lr": 0.012345678, "beta": 0.9}, "Adam": {"lr": 5.0}}))
    (out / "search.json").write_text(json.dumps({"LODO": SEARCH, "Adam": SEARCH}))
    return report(BOWL, out), out, results


def test_bowl_losses(bowl: tuple[str, Path, list[Result]]) -> None:
    text, _, results = bowl
    main = [result for result in results if result["job"]["part"] == "main"]
    shortest = min(result["seconds"] for result in main if result["status"] == "finished")
    for name in BOWL_SPEED:
        row = table_row(text, name, "## Losses")
        losses = [result["final_loss"] for result in of(main, name)]
        assert row["Loss"] == f"{np.mean(losses):.2f} ± {np.std(losses, ddof=1):#.2g}"
        assert row["Loss / floor"] == f"{np.mean(losses) / FLOOR:.3f}"
        assert float(row["Above the floor"]) == pytest.approx(np.mean(losses) - FLOOR, rel=1e-3)
        timed = []
        for result in of(main, name):
            pairs = zip(result["curve"]["seconds"], result["curve"]["loss"], strict=True)
            timed.append(np.mean([loss for end, loss in pairs if 0.9 * shortest < end <= shortest]))
        assert row["Loss, same time"] == f"{np.mean(timed):.2f} ± {np.std(timed, ddof=1):#.2g}"
        assert row["Diverged"] == ("1/3" if name == "SGD" else "0/3")
    assert table_row(text, "Floor", "## Losses")["Loss"] == f"{FLOOR:.3f}"
    # Seeds 0, 1, 2 ran at 1, 1.05 and 1.1 times the given speed.
    assert table_row(text, "Adam", "## Losses")["Steps/s"] == "420"
    assert table_row(text, "LODO", "## Losses")["Steps/s, Adam = 1"] == "0.200"


def test_bowl_order_and_headlines(bowl: tuple[str, Path, list[Result]]) -> None:
    text, _, results = bowl
    main = [result for result in results if result["job"]["part"] == "main"]
    losses = text.split("## Losses")[1].split("## ")[0]
    assert re.findall(r"^\| ([\w-]+) \|", losses, re.M) == [
        "Optimizer",
        "Floor",
        *sorted(BOWL_SPEED, key=BOWL_SPEED.get),
    ]
    lodo, adam = (np.mean([result["final_loss"] for result in of(main, name)]) for name in ("LODO", "Adam"))
    change = 100 * (1 - lodo / adam)
    assert f"after the same steps: LODO is {change:.1f} % below the best first-order baseline, Adam" in text
    excess = 100 * (1 - (lodo - FLOOR) / (adam - FLOOR))
    assert f"above the floor, after the same steps: LODO is {excess:.1f} % below" in text


def test_bowl_hessian_error(bowl: tuple[str, Path, list[Result]]) -> None:
    row = table_row(bowl[0], "LODO", "## Hessian error")
    assert row["First"] == f"{np.mean([hessian(seed)['value'][0] for seed in SEEDS]):.4f}"
    assert row["Last"] == f"{np.mean([hessian(seed)['value'][-1] for seed in SEEDS]):.4f}"
    assert row["From, to"] == "step 100 to 2,000"


def test_bowl_hyperparameters_and_their_origin(bowl: tuple[str, Path, list[Result]]) -> None:
    heading = "## Hyperparameters"
    assert table_row(bowl[0], "LODO", heading) == {
        "Optimizer": "LODO",
        "Hyperparameters": "lr = 0.01235, beta = 0.9",
        "From": "searched here",
    }
    assert table_row(bowl[0], "SGD", heading)["From"] == "given"
    assert table_row(bowl[0], "Adam", heading)["From"] == "given: not what the search here found"


def test_bowl_sweeps(bowl: tuple[str, Path, list[Result]]) -> None:
    text, _, results = bowl
    runs = [result for result in results if result["job"]["part"] == "noise" and result["job"]["value"] == 2.0]
    losses = np.array([result["final_loss"] for result in runs])
    row = table_row(text, "2", "### Sweep: noise")
    assert row["Loss"] == f"{losses.mean():.2f} ± {losses.std(ddof=1):#.2g}"
    assert row["Loss / noise^2"] == f"{losses.mean() / 4:.2f} ± {losses.std(ddof=1) / 4:#.2g}"
    assert table_row(text, "24", "### Sweep: depth") == {"depth N": "24", "Loss": "-", "Diverged": "3/3"}
    assert table_row(text, "16", "### Sweep: depth")["Diverged"] == "1/3"
    assert "The floor is 7.412 times noise^2." in text


def test_bowl_says_what_was_run(bowl: tuple[str, Path, list[Result]]) -> None:
    text = bowl[0]
    section = text.split("## What was run")[1].split("## ")[0]
    for expected in (
        "3, at seeds 0 to 2",
        "genetic search, 2 generations of 8 runs of 100 to 500 steps: LODO, Adam",
        "2,000 steps instead of 100,000; 3 runs instead of 8",
        "without RMSprop, Yogi, L-BFGS",
        "sweep of beta, block size: not run",
        "sweep of depth, frozen, noise: 1,000 steps instead of 100,000, 3 runs instead of 8",
        "2 generations of 8 runs of 100 to 500 steps instead of genetic search, 10 generations of 32 runs",
        "no search here for SGD, LODO-Diagonal",
        "torch 2.11.0",
        "2026-01-01T00:00:00+00:00 to 2026-01-03T00:00:00+00:00",
        "paper bowl --stages search --optimizers LODO,Adam --trials 8 --generations 2 --search-steps 500 --threads 1",
        "--stages train,sweep,report --optimizers SGD,Adam,LODO,LODO-Diagonal --steps 2000 --runs 3 --sweep-steps 1000",
    ):
        assert expected in section, expected


def test_bowl_pictures(bowl: tuple[str, Path, list[Result]]) -> None:
    names = {"losses_by_step.png", "losses_by_time.png", "hessian_error.png"}
    assert_pictures(bowl[0], bowl[1], names | {f"sweep_{name}.png" for name in ("depth", "frozen", "noise")})


def test_rosenbrock(tmp_path: Path) -> None:
    text = report(ROSENBROCK, store(rosenbrock_results(), tmp_path))
    assert_pictures(text, tmp_path, {"losses_by_step.png", "losses_by_time.png", "trajectories.png"})
    assert "Floor" not in text
    assert "without RMSprop" in text


def test_images(tmp_path: Path) -> None:
    results = image_results()
    text = report(CLASSIFICATION, store(results, tmp_path))
    names = {f"{what}_by_{axis}.png" for what in ("losses", "validation") for axis in ("step", "time")}
    assert_pictures(text, tmp_path, names)
    last = np.array([result["validation"]["test_accuracy"][-1] for result in of(results, "LODO")])
    row = table_row(text, "LODO", "## Validation")
    assert row["test accuracy"] == f"{last.mean():.4f} ± {last.std(ddof=1):#.2g}"
    assert table_row(text, "LARS", "## Validation") == {
        "Optimizer": "LARS",
        "test loss": "-",
        "test accuracy": "-",
        "Diverged": "3/3",
    }
    assert "batch size 64" in text
    assert "--data-root DATA --batch-size 64" in text
    assert table_row(text, "LARS", "## Losses")["Loss"] == "-"


@pytest.mark.usefixtures("undrawn")
def test_one_seed_of_one_optimizer(tmp_path: Path) -> None:
    result = next(result for result in bowl_results((0,)) if result["job"]["label"] == "LODO")
    text = report(BOWL, store([result], tmp_path))
    row = table_row(text, "LODO", "## Losses")
    assert row["Loss"] == f"{result['final_loss']:.2f}"
    assert row["Steps/s, Adam = 1"] == "-"
    assert "best first-order" not in text


def test_all_diverged(tmp_path: Path) -> None:
    result = make_result(make_job(BOWL, "SGD", 0), tracking(1e20), 1000.0, diverged_at=900)
    text = report(BOWL, store([result], tmp_path))
    assert table_row(text, "SGD", "## Losses")["Diverged"] == "1/1"
    assert_pictures(text, tmp_path, {"losses_by_step.png", "losses_by_time.png"})


def test_huge_losses(tmp_path: Path) -> None:
    results = [make_result(make_job(BOWL, "SGD", seed), tracking(1e200), 1000.0) for seed in SEEDS]
    text = report(BOWL, store(results + of(bowl_results(), "LODO"), tmp_path))
    assert re.fullmatch(r"\d\.\d{3}e\+2\d\d ± .*", table_row(text, "SGD", "## Losses")["Loss"])


@pytest.mark.usefixtures("undrawn")
def test_sweeps_alone(tmp_path: Path) -> None:
    text = report(BOWL, store(sweep_results(), tmp_path))
    assert "## Losses" not in text
    assert "### Sweep: frozen" in text


@pytest.mark.usefixtures("undrawn")
def test_slow_optimizer_has_no_loss_at_the_common_time(tmp_path: Path) -> None:
    slow = [make_result(make_job(BOWL, "L2L", seed), tracking(20.0), 1.0) for seed in SEEDS]
    text = report(BOWL, store(bowl_results() + slow, tmp_path))
    assert table_row(text, "L2L", "## Losses")["Loss, same time"] == "-"


@pytest.mark.usefixtures("undrawn")
def test_latest_settings_alone_count(tmp_path: Path) -> None:
    old = [make_result(make_job(BOWL, "LODO", seed, hyperparameters={}), tracking(99.0), 1.0) for seed in SEEDS]
    new = of(bowl_results(), "LODO")
    assert latest(old + new) == new
    assert "left out: 3 older runs" in report(BOWL, store(old + new, tmp_path))


def test_no_results(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no results: `python -m examples\.paper bowl` makes them"):
        write_report(BOWL, tmp_path)


@pytest.mark.usefixtures("undrawn")
def test_reading_is_kept(tmp_path: Path) -> None:
    store(bowl_results((0,)), tmp_path)
    (tmp_path / "reading.md").write_text("## Reading\n\nLODO wins: naïvely, `a < b`.\n", encoding="utf-8")
    first = report(BOWL, tmp_path)
    assert first.startswith(
        "# Noisy quadratic bowl (section 5.1)\n\n## Reading\n\nLODO wins: naïvely, `a < b`.\n\n## What"
    )
    assert report(BOWL, tmp_path) == first


@pytest.mark.usefixtures("undrawn")
def test_runs_as_long_as_the_papers(tmp_path: Path) -> None:
    seeds = range(ROSENBROCK.runs)
    results = [
        make_result(make_job(ROSENBROCK, name, seed, steps=ROSENBROCK.steps), falling(3.0, 0.1), 1000.0)
        for name, seed in itertools.product(ROSENBROCK.optimizers, seeds)
    ]
    paper = {"sampler": "genetic", "population": ROSENBROCK.population}
    schedule = [[each.std, each.steps] for each in ROSENBROCK.schedule]
    searched = dict.fromkeys(ROSENBROCK.optimizers, paper | {"schedule": schedule})
    (tmp_path / "search.json").write_text(json.dumps(searched))
    text = report(ROSENBROCK, store(results, tmp_path))
    assert "as many as in the paper" in text
    assert "Not as in the paper" not in text
    assert "python -m examples.paper rosenbrock --stages search --threads 1\n" in text


def test_every_optimizer_has_its_own_color() -> None:
    assert set(pictures.COLORS) == set(OPTIMIZERS)
    assert len(set(pictures.COLORS.values())) == len(OPTIMIZERS)
    assert set(itertools.chain.from_iterable(each.optimizers for each in EXPERIMENTS.values())) <= set(pictures.COLORS)


def test_rebin_keeps_ends_and_means() -> None:
    ends, values = np.arange(1.0, 201.0), np.arange(200.0)
    x, y = pictures.rebin(ends, values)
    assert x[-1] == 200
    assert len(x) <= pictures.MANY_BINS
    assert y[0] == values[:4].mean()
    assert x[0] == 4


def test_image_grid(tmp_path: Path) -> None:
    images = np.zeros((5, 28, 28), dtype=np.uint8)
    images[3] = 255
    sheet = imread(pictures.image_grid(images, tmp_path / "digits.png", zoom=1))
    assert sheet.shape == (2 * 29 - 1, 3 * 29 - 1)
    assert (sheet[29:57, :28] == 1).all()
    assert (sheet[:28, :28] == 0).all()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7.411847, "7.412"),
        (0.99999, "1.000"),
        (0.0, "0"),
        (123456.7, "123,457"),
        (3.21e-9, "3.210e-09"),
        (-0.5, "-0.5000"),
        (float("inf"), "inf"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("values", "text"), [((), "-"), ((2.0,), "2.000"), ((1.0, 3.0), "2.000 ± 1.4")])
def test_plus_minus(values: tuple[float, ...], text: str) -> None:
    assert plus_minus(values) == text


@pytest.mark.usefixtures("undrawn")
def test_unfinished_optimizers_are_named(tmp_path: Path) -> None:
    runs: Mapping[str, int] = {"LODO": 3, "Adam": 1}
    results = [result for name, count in runs.items() for result in of(bowl_results(), name)[:count]]
    text = report(BOWL, store(results, tmp_path))
    assert "1 to 3 runs instead of 8" in text
    assert re.search(r"^- runs: .*(LODO|Adam): ", text, re.M)
