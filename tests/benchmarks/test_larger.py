"""The comparison on a GPT and a ResNet: models, data, searches, resuming, reports."""

import itertools
import json
import math

import pytest
import torch

pytest.importorskip("matplotlib", reason="the extra `benchmarks` is not installed")
pytest.importorskip("pytorch_optimizer", reason="the extra `benchmarks` is not installed")

from benchmarks.larger import __main__ as command
from benchmarks.larger import plan as planning
from benchmarks.larger import running
from benchmarks.larger.contenders import ANCHOR, CONTENDERS, LODO, Axis, get_contender
from benchmarks.larger.gpt import GPT, WIDTHS, Text, make_gpt, standard_library
from benchmarks.larger.plan import Records, search
from benchmarks.larger.problem import Problem
from benchmarks.larger.report import write_report
from benchmarks.larger.resnet import ResNet, make_resnet
from benchmarks.larger.running import FINAL, SEARCH, Clock, Log, final_loss, run, train
from benchmarks.larger.tasks import TASKS
from benchmarks.schedules import factor_at
from examples.cifar import Cifar10
from examples.paper.runs import read_results

TINY = ["--width", "16", "--depth", "1", "--context", "8", "--batch-size", "2", "--steps", "3", "--threads", "1"]
SHAPE = {"width": 16, "depth": 1, "context": 8, "batch_size": 2, "is_tied": False}
HELD_OUT_LABEL = 9


def images(count=200):
    """Random ones; the last tenth, and no other, is of class 9."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count + 20, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(HELD_OUT_LABEL, (count + 20,), generator=generator)
    labels[count - count // 10 : count] = HELD_OUT_LABEL
    return Cifar10(pixels[:count], labels[:count], pixels[count:], labels[count:])


def resnet(seed=0):
    return make_resnet(seed, "cpu", images(), depth=8, batch_size=16)


def gpt(seed=0, **changes):
    return make_gpt(seed, "cpu", standard_library(), **{**SHAPE, **changes})


def tiny_plan(out, *more):
    return command.parse(["gpt", *TINY, "--out", str(out), *more])[0]


def tiny_job(out, contender="AdamW", stage=FINAL, **settings):
    plan, found = tiny_plan(out), get_contender(contender)
    return plan.job(stage, "text", found, {**found.settings(plan.task), **settings}, 0)


# Models and data


def test_models_have_the_sizes_that_are_promised():
    for name, millions in {"small": 0.2, "medium": 0.8, "large": 3.2}.items():
        found = sum(param.numel() for param in GPT(WIDTHS[name]).blocks.parameters())
        assert found == pytest.approx(1e6 * millions, rel=0.03)
    assert sum(param.numel() for param in ResNet(8).parameters()) == 78_042
    assert sum(param.numel() for param in ResNet(14).parameters()) == 175_258
    tied = GPT(16, 1, is_tied=True)
    assert tied.head.weight is tied.tokens.weight


def test_a_prediction_sees_what_is_before_it_and_nothing_else():
    model = GPT(32, 2, 8).double()
    text = torch.randint(256, (1, 8))
    changed = text.clone()
    changed[0, 4] = (text[0, 4] + 1) % 256
    differs = (model(text) != model(changed)).any(-1)[0]
    assert differs.tolist() == [False] * 4 + [True] * 4


def test_whole_files_are_held_out(tmp_path):
    for number in range(25):
        (tmp_path / f"m{number:02}.py").write_bytes(bytes([number]) * (number + 1))
    text = standard_library(tmp_path)
    assert text.held_out_files == ("m09.py", "m19.py")
    assert text.held_out.tolist() == [9] * 10 + [19] * 20
    assert set(text.training.tolist()) == set(range(25)) - {9, 19}
    ours = standard_library()
    assert not set(ours.training_files) & set(ours.held_out_files)
    assert 0.02 < len(ours.held_out) / (len(ours.training) + len(ours.held_out)) < 0.3
    assert f"{len(ours.held_out) + len(ours.training)} bytes" in ours.name


def test_a_text_without_sources_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="at least 10 modules"):
        standard_library(tmp_path / "none")


def test_a_gpt_is_trained_on_one_part_of_the_text_and_measured_on_the_other():
    low, high = torch.randint(100, (500,)), torch.randint(100, 256, (500,))
    problem = make_gpt(0, "cpu", Text(low, high, (), (), ""), **SHAPE)
    drawn = torch.cat([torch.cat(problem._draw(problem._generator)) for _ in range(200)])
    measured = torch.cat([torch.cat(batch) for batch in problem._validation])
    assert drawn.max() < 100
    assert measured.min() >= 100
    inputs, targets = problem._validation[0]
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_a_resnet_is_trained_on_all_images_but_those_held_out():
    problem = resnet()
    drawn = torch.cat([problem._draw(problem._generator)[1] for _ in range(12)])
    assert HELD_OUT_LABEL not in drawn[:180]
    expected = images().train_labels[:180].bincount(minlength=10)
    assert torch.equal(drawn[:180].bincount(minlength=10), expected)  # one epoch
    assert {int(label) for _, labels in problem._validation for label in labels} == {HELD_OUT_LABEL}


@pytest.mark.parametrize("make", [gpt, resnet])
def test_a_problem_follows_from_its_seed_alone(make):
    before = torch.get_rng_state()
    one, same, other = make(3), make(3), make(4)
    assert torch.equal(torch.get_rng_state(), before)
    losses = [[problem.loss().item() for _ in range(2)] for problem in (one, same, other)]
    assert losses[0] == losses[1] != losses[2]


def test_figures_are_means_over_all_of_the_held_out_data():
    class Sure(torch.nn.Module):
        def forward(self, x):
            return torch.log(torch.tensor([0.75, 0.25])).expand(len(x), 2)

    ones, zeros = torch.ones(1, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    problem = Problem(Sure(), [], lambda generator: (zeros, zeros), [(ones, ones), (zeros, zeros)], None, 0)
    found = problem.validate()
    assert found.loss == pytest.approx(-(math.log(0.25) + 3 * math.log(0.75)) / 4)
    assert found.accuracy == 0.75
    assert problem.test() is None


# Runs


def test_only_hidden_matrices_are_for_muon():
    names = {id(param): name for name, param in gpt().model.named_parameters()}
    assert len(names) == len(gpt().params)
    for problem in (gpt(), resnet()):
        names = {id(param): name for name, param in problem.model.named_parameters()}
        hidden = [names[id(param)] for param in problem.hidden]
        assert hidden
        assert not [name for name in hidden if name.startswith(("tokens", "places", "head"))]
        task = TASKS["gpt" if problem.test() is None else "resnet"]
        muon, adamw = CONTENDERS["Muon"].make(problem, CONTENDERS["Muon"].settings(task))
        given = [param for each in (muon, adamw) for group in each.param_groups for param in group["params"]]
        assert {id(param) for param in given} == names.keys()
        assert len(given) == len(names)


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("make", [gpt, resnet])
def test_every_contender_trains(name, make):
    problem = make()
    task = TASKS["gpt" if make is gpt else "resnet"]
    contender = get_contender(name)
    log = Log(20, 2)
    train(problem, contender.make(problem, contender.settings(task)), False, 20, Clock("cpu"), log)
    assert log.losses[-5:].mean() < log.losses[:5].mean()
    assert log.validation["step"] == [10, 20]


@pytest.mark.parametrize("make", [gpt, resnet])
@pytest.mark.parametrize("name", ["AdamW", LODO])
def test_validation_does_not_disturb_training(make, name):
    """Same bits, batch norms' statistics among them, however often one asks."""
    states = []
    for validations in (10, 1):
        problem = make()
        optimizers = get_contender(name).make(problem, get_contender(name).settings(TASKS["gpt"]))
        log = Log(10, validations)
        train(problem, optimizers, True, 10, Clock("cpu"), log)
        assert len(log.validation["loss"]) == validations
        states.append((problem.model.state_dict(), log.losses))
    assert (states[0][1] == states[1][1]).all()
    assert all(torch.equal(value, states[1][0][key]) for key, value in states[0][0].items())


def test_a_model_is_measured_in_evaluation_mode():
    problem = resnet()
    before = {name: buffer.clone() for name, buffer in problem.model.named_buffers()}
    once, again = problem.validate(), problem.validate()
    assert once == again
    assert problem.model.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in problem.model.named_buffers())
    problem.loss()
    assert not torch.equal(problem.model.norm.running_mean, before["norm.running_mean"])
    assert problem.validate() != once  # it is the running statistics that it uses


def test_scheduled_rates_rise_and_fall():
    factors = [factor_at("warmup_cosine", step, 100) for step in range(100)]
    assert factors[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert all(one > other for one, other in itertools.pairwise(factors[5:]))
    assert 0 < factors[-1] < 1e-3
    problem, rates = gpt(), []

    class Recording(torch.optim.SGD):
        def step(self):
            rates.append(self.param_groups[0]["lr"])

    for is_scheduled in (True, False):
        train(problem, [Recording(problem.params, lr=2.0)], is_scheduled, 100, Clock("cpu"), Log(100, 1))
    assert rates == pytest.approx([2 * factor for factor in factors] + [2.0] * 100)


def test_seconds_are_those_of_training_alone(monkeypatch):
    """On a clock that moves on by one whenever it is read."""
    ticks = itertools.count()
    monkeypatch.setattr(running.time, "perf_counter", lambda: float(next(ticks)))
    problem = gpt()
    monkeypatch.setattr(problem, "validate", lambda: [next(ticks) for _ in range(1000)] and some_figures())
    clock, log = Clock("cpu"), Log(5, 5)
    train(problem, [torch.optim.SGD(problem.params, lr=0.1)], False, 5, clock, log)
    assert (clock.total, clock.optimizer) == (10.0, 5.0)
    assert log.validation["seconds"] == [2, 4, 6, 8, 10]


def some_figures():
    return running.Figures(1.0, 0.5)


def test_a_run_says_what_it_was(tmp_path):
    before = torch.get_rng_state(), torch.get_num_threads()
    record = run(tiny_job(tmp_path, LODO))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_num_threads() == before[1]
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["diverged_at"] is None
    assert record["parameters"] == sum(param.numel() for param in gpt().params)
    assert record["validation"]["step"] == record["training"]["step"] == [1, 2, 3]
    assert 0 < record["optimizer_seconds"] < record["seconds"]
    assert {"lodo_source", "torch", "threads", "device_name", "python"} <= record["environment"].keys()
    assert record["environment"]["threads"] == 1
    searched = run(tiny_job(tmp_path, LODO, SEARCH))
    assert searched["validation"]["step"] == [3]
    assert searched["validation"]["loss"][-1] == record["validation"]["loss"][-1]


def test_the_training_loss_is_a_running_mean():
    log = Log(200, 1)
    for step in range(200):
        log.add(float(step), 0.0)
    assert log.training["step"] == list(range(2, 201, 2))
    assert log.training["loss"][0] == 0.5
    assert log.training["loss"][-1] == sum(range(180, 200)) / 20


def test_a_run_that_diverges_says_where(tmp_path):
    record = run(tiny_job(tmp_path, lr=1e30))
    assert record["diverged_at"] in (2, 3)
    assert final_loss(record) == math.inf
    json.dumps(record, allow_nan=False)


# Searches and resuming


def followed(axis, loss):
    """The places that an axis is searched at, given the loss at each."""
    losses = {}
    while places := axis.lacking(losses):
        assert not set(places) & losses.keys()
        losses |= {place: loss(place) for place in places}
    return losses


def test_an_axis_is_widened_while_the_best_stands_at_an_end():
    axis = Axis("lr", 1e-3)
    assert sorted(followed(axis, abs)) == [-2, -1, 0, 1, 2]
    high = followed(axis, lambda place: abs(place - 3))
    assert sorted(high) == [-2, -1, 0, 1, 2, 3, 4]
    assert axis.best(high) == 3
    assert min(followed(axis, lambda place: abs(place + 2))) == -3
    assert sorted(followed(axis, lambda place: place)) == list(range(-8, 3))  # it ends somewhere
    assert axis.best(followed(axis, lambda place: math.inf)) == 0
    assert [axis.value(place) for place in range(-2, 3)] == [1e-4, 3.2e-4, 1e-3, 3.2e-3, 1e-2]


@pytest.fixture
def made(monkeypatch):
    """Runs are not trained but made up; the list of their jobs. A loss tells the distance of lr from 3e-3."""
    jobs = []

    def make_up(job, data_root=None):
        jobs.append(job)
        lr = job.settings.get("lr", 3e-3)
        loss = 1 + abs(math.log10(lr / 3.2e-3)) + abs(math.log10(job.settings.get("adamw_lr", 3e-3) / 3e-3))
        loss += 0.1 * (job.seed % 1000) + (0.5 if job.contender == ANCHOR else 0.0)
        columns = {"step": [1, 2, 3], "seconds": [2.0, 4.0, 6.0], "loss": [loss + 2, loss, loss]}
        return {
            "format": running.FORMAT,
            "key": job.key,
            "job": running.asdict(job),
            "parameters": 1234,
            "diverged_at": None,
            "training": columns,
            "validation": columns | {"accuracy": [0.1, 0.2, 0.3]},
            "test": None,
            "seconds": 6.0,
            "optimizer_seconds": 3.0,
            "environment": {"load": 0.5, "threads": 1, "lodo": "0", "lodo_source": "abc", "torch": "2"},
        }

    monkeypatch.setattr(planning, "run", make_up)
    return jobs


def test_no_run_is_made_twice(tmp_path, made, monkeypatch):
    arguments = ["gpt", *TINY, "--out", str(tmp_path), "--stages", "search,final"]
    whole, limit = planning.run, 9

    def killed(job, data_root=None):
        if len(made) == limit:
            raise KeyboardInterrupt
        return whole(job, data_root)

    monkeypatch.setattr(planning, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        command.main(arguments)
    assert len(read_results(tmp_path / "runs.jsonl")) == limit
    monkeypatch.setattr(planning, "run", whole)
    command.main(arguments)
    keys = [job.key for job in made]
    assert len(keys) == len(set(keys)) == len(read_results(tmp_path / "runs.jsonl"))
    command.main(arguments)
    assert len(made) == len(keys)
    counts = {stage: sum(job.stage == stage for job in made) for stage in (SEARCH, FINAL)}
    # AdamW 5, SOAP 5; Muon 5 and, as 2e-3 is the best, one more below, then two of the other rate.
    assert counts == {SEARCH: 18, FINAL: 15}


def test_final_runs_take_the_best_settings(tmp_path, made):
    command.main(["gpt", *TINY, "--out", str(tmp_path), "--stages", "search,final", "--seeds", "4,5"])
    finals = [job for job in made if job.stage == FINAL]
    assert {job.seed for job in finals} == {4, 5}
    assert {job.settings["lr"] for job in finals if job.contender == "AdamW"} == {3.2e-3}
    assert {job.settings["lr"] for job in finals if job.contender == "Muon"} == {2e-3}
    assert {job.settings["lr"] for job in finals if job.contender == ANCHOR} == {1e-3}
    assert [dict(job.settings) for job in finals if job.contender == LODO] == [{}, {}]
    assert {job.seed for job in made if job.stage == SEARCH} == {1000}
    assert not [job for job in made if job.stage == SEARCH and job.contender in (ANCHOR, LODO)]


def test_final_runs_wait_for_the_search(tmp_path, made, capsys):
    command.main(["gpt", *TINY, "--out", str(tmp_path), "--stages", "final"])
    assert {job.contender for job in made} == {ANCHOR, LODO}
    assert "left out, for their search is not done: AdamW; Muon; SOAP" in capsys.readouterr().err


def test_other_options_are_other_runs(tmp_path, made):
    for more in ([], ["--tied"], ["--depth", "2"], ["--threads", "2"]):
        command.main(
            ["gpt", *TINY, *more, "--out", str(tmp_path), "--stages", "final", "--contenders", LODO, "--seeds", "0"]
        )
    assert len(made) == 4


def test_the_search_takes_steps_in_proportion():
    task = TASKS["resnet"]
    plan = command.parse(["resnet", "--data-root", "x", "--steps", str(task.steps * 2)])[0]
    assert (plan.steps, plan.search_steps) == (task.steps * 2, task.search_steps * 2)
    plan = command.parse(["resnet", "--data-root", "x", "--search-steps", "7"])[0]
    assert (plan.steps, plan.search_steps) == (task.steps, 7)


# Reports


def test_a_report_is_made_from_records_alone(tmp_path, made, capsys):
    command.main(["gpt", *TINY, "--out", str(tmp_path), "--stages", "search,final"])
    count = len(made)
    command.main(["gpt", *TINY, "--out", str(tmp_path), "--stages", "report"])
    assert len(made) == count
    page = (tmp_path / "gpt.md").read_text()
    assert page in capsys.readouterr().out
    assert (tmp_path / "gpt.png").stat().st_size > 10_000
    rows = {line.split(" | ")[0].strip("| "): line for line in page.splitlines() if line.startswith("| ")}
    assert set(CONTENDERS) < set(rows)
    assert "1.1000 (1.0000 to 1.2000)" in rows["AdamW"]
    assert rows["AdamW"].endswith("| 50% | 2 | 4 |")
    assert rows[ANCHOR].endswith("| not reached | not reached |")
    assert "test accuracy" not in page  # there is none
    assert "0.0001: 2.5051, 0.00032: 2.0000" in page  # what was searched
    assert standard_library().name in page
    assert "source abc" in page


def test_a_report_names_what_diverged(tmp_path, made):
    plan = tiny_plan(tmp_path, "--contenders", f"{LODO}; {ANCHOR}")
    records = Records(plan.records_path)
    planning.make_finals(plan, records, "text")
    for record in records.found.values():
        if record["job"]["contender"] == LODO and record["job"]["seed"] == 1:
            record["diverged_at"] = 2
    assert "| LODO | 1 of 3 diverged |" in write_report(plan, records)


def test_runs_on_different_texts_are_not_mixed(tmp_path, made):
    plan = tiny_plan(tmp_path, "--contenders", LODO)
    records = Records(plan.records_path)
    with pytest.raises(ValueError, match="it holds none"):
        write_report(plan, records)
    for text in ("one text", "another"):
        planning.make_finals(plan, records, text)
    with pytest.raises(ValueError, match="holds runs on another; one text"):
        write_report(plan, records)


def test_a_whole_comparison_runs(tmp_path):
    arguments = ["gpt", *TINY, "--out", str(tmp_path), "--seeds", "0"]
    command.main(arguments)
    plan, records = command.parse(arguments)[0], Records(tmp_path / "runs.jsonl")
    assert not search(plan, records, standard_library().name, get_contender("SOAP")).lacking
    assert (tmp_path / "gpt.md").exists()


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet"], "resnet needs --data-root"),
        (["resnet", "--data-root", "x", "--depth", "9"], "--depth must be 8, 14, 20 or another 6 n + 2, got 9"),
        (["resnet", "--data-root", "x", "--depth", "2"], "--depth must be 8, 14, 20"),
        (["gpt", "--width", "100"], "--width must be a multiple of 32, or less than that, got 100"),
        (["gpt", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["gpt", "--threads", "-1"], "--threads must be at least 1, got -1"),
        (["gpt", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["gpt", "--contenders", "AdamW; Adagrad"], "contender must be one of AdamW; Muon; SOAP; "),
        (["gpt", "--stages", "search,rest"], "--stages must be of search, final, report, got rest"),
        (["gpt", "--seeds", "1,x"], "--seeds must be whole numbers of at least 0, separated by commas, got '1,x'"),
        (["gpt", "--seeds", ""], "--seeds must be whole numbers"),
        (["gpt", "--device", "tpu"], "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["gpt", "--device", "cuda:99"], "--device must be there, got 'cuda:99'"),
        (["gpt", "--size", "huge"], "invalid choice: 'huge'"),
        (["vit"], "invalid choice: 'vit'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        command.main(arguments)
    assert error.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_missing_data_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("examples.cifar._download", lambda root: "not downloaded")
    with pytest.raises(SystemExit, match=r"CIFAR-10 is not complete in .*data_batch_1\.bin"):
        command.main(["resnet", "--data-root", str(tmp_path), "--out", str(tmp_path / "out")])
