"""Tasks whose structure is drawn. Tests look at tasks of other seeds; of the sealed ones, that they can be built."""

import hashlib
import math

import pytest
import torch

from benchmarks.shootout import text
from benchmarks.shootout.contenders import hidden_matrices
from benchmarks.shootout.generated import SEALED, SEALED_SEED, draw_tasks
from benchmarks.shootout.generated.design import FEWEST, MOST
from benchmarks.shootout.generated.sequences import MODULES
from benchmarks.shootout.tasks import SEALED_TASKS, TASKS, get_task

SEEDS = (1, 2, 3)
DRAWN = [pytest.param(task, id=f"{seed}-{task.name}") for seed in SEEDS for task in draw_tasks(seed)]
SEAL = "4bbf2ced13d2ad09"


def train(problem, steps, validates=False):
    """The losses of some steps of AdamW."""
    optimizer = torch.optim.AdamW(problem.params, lr=1e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if validates:
            problem.validate()
    return losses


def row_set(data):
    """The rows of a tensor or, joined, of a pair of tensors."""
    parts = data if isinstance(data, tuple) else (data,)
    return set(map(tuple, torch.cat([part.reshape(len(part), -1).double() for part in parts], dim=1).tolist()))


def test_the_seal_is_not_broken():
    """If this fails, other tasks are drawn than those that were put under seal: undo that, or draw from a new seed."""
    drawn = "\n".join(f"{task.name}, {task.version}, {task.kind}, {task.steps}, {task.make!r}" for task in SEALED)
    digest = hashlib.sha256(drawn.encode()).hexdigest()[:16]  # all that a failure shows
    assert digest == SEAL
    assert SEALED_SEED == 20261128


@pytest.mark.parametrize("name", SEALED_TASKS)
def test_sealed_tasks_can_be_built(name):
    problem = get_task(name).build(0)
    assert math.isfinite(problem.idle_loss)
    assert problem.idle_loss > 0


def test_sealed_tasks_are_found_by_name_but_are_not_among_the_others():
    assert all(get_task(task.name) is task for task in SEALED)
    assert {task.split for task in SEALED} == {"sealed"}
    assert not TASKS.keys() & SEALED_TASKS.keys()
    assert "sealed" not in {task.split for task in TASKS.values()}


def test_tasks_follow_from_their_seed_and_differ_between_seeds():
    assert draw_tasks(1) == draw_tasks(1)
    for tasks in zip(*map(draw_tasks, SEEDS), strict=True):
        assert len({task.kind for task in tasks}) == len(SEEDS)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_six_tasks_of_a_seed_are_of_six_kinds(seed):
    tasks = draw_tasks(seed)
    assert len(tasks) == 6
    assert len({type(task.make) for task in tasks}) == 6
    assert len({task.name for task in tasks}) == 6


def test_every_budget_is_within_the_limits():
    for task in (task for seed in range(1, 200) for task in draw_tasks(seed)):
        assert FEWEST <= task.steps <= MOST
        assert 2000 <= task.steps * task.make.milliseconds <= 8000


@pytest.mark.parametrize("task", DRAWN)
def test_a_problem_follows_from_its_seed_alone(task):
    before = torch.get_rng_state()
    one, same, other = task.build(3), task.build(3), task.build(4)
    assert torch.equal(torch.get_rng_state(), before)
    losses = [[float(problem.loss().detach()) for _ in range(3)] for problem in (one, same, other)]
    assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1]
    assert len(set(losses[0] + losses[2])) == 6
    assert all(map(math.isfinite, losses[0]))
    assert math.isfinite(one.idle_loss)
    assert one.idle_loss > 0


@pytest.mark.parametrize("task", DRAWN)
def test_validation_leaves_the_training_as_it_was(task):
    one, same = task.build(0), task.build(0)
    assert train(one, 3) == train(same, 3, validates=True)
    assert one.validate() == same.validate()
    for param, other in zip(one.params, same.params, strict=True):
        assert torch.equal(param, other)


@pytest.mark.parametrize("task", DRAWN)
def test_every_parameter_has_a_finite_gradient_and_flags_say_the_truth(task):
    problem = task.build(0)
    problem.loss().backward()
    assert all(param.grad.isfinite().all() for param in problem.params)
    assert sum(float(param.grad.abs().sum()) for param in problem.params) > 0
    loss, accuracy = problem.validate()
    assert math.isfinite(loss)
    assert accuracy is None or 0 <= accuracy <= 1
    assert bool(hidden_matrices(problem.model)) == task.has_matrices
    assert task.is_validated
    assert not task.is_deterministic
    assert not task.needs_mnist
    assert task.has_finite_data == ("sequences" not in task.name)


@pytest.mark.parametrize("task", [each for each in DRAWN if hasattr(each.values[0].make, "data")])
def test_no_row_to_validate_with_is_trained_on(task):
    kept, held_out = map(row_set, task.make.data(0))
    assert kept
    assert held_out
    assert not kept & held_out


def test_no_module_to_validate_with_is_trained_on():
    assert not set(MODULES) & set(text.HELD_OUT_MODULES)


def test_a_tied_output_layer_is_an_embedding_and_no_matrix():
    task = next(task for seed in range(1, 50) for task in draw_tasks(seed) if getattr(task.make, "tied", False))
    model = task.build(0).model
    assert all(param is not model.characters.weight for param in hidden_matrices(model))


@pytest.mark.parametrize("task", draw_tasks(1), ids=lambda task: task.name)
def test_some_steps_of_adamw_lower_the_loss(task):
    problem = task.build(0)
    losses = train(problem, 40)
    assert sum(losses[-10:]) / 10 < 0.98 * problem.idle_loss
