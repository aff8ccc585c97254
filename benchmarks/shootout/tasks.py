"""All tasks of the comparison, by name: eight to choose defaults on, six to hold out, three fresh ones, six sealed."""

from collections.abc import Mapping

from benchmarks.shootout import fresh, generated, images, synthetic, text
from benchmarks.shootout.problem import Problem, Task

__all__ = ["SEALED_TASKS", "TASKS", "Problem", "Task", "get_task"]

_ALL = (
    Task("digits_mlp", "classifier, noisy images", 5000, images.digits_mlp, "choose", has_finite_data=True),
    Task("mnist_mlp", "classifier", 4000, images.mnist_mlp, "choose", needs_mnist=True, has_finite_data=True),
    Task(
        "autoencoder",
        "deep tanh autoencoder",
        2000,
        images.autoencoder,
        "choose",
        needs_mnist=True,
        has_finite_data=True,
    ),
    Task("transformer", "characters, attention", 1500, text.transformer, "choose", has_finite_data=True),
    Task(
        "logistic",
        "convex, ill-conditioned",
        12_000,
        synthetic.logistic,
        "choose",
        has_matrices=False,
        has_finite_data=True,
    ),
    Task("pinn", "differential equation", 4000, synthetic.pinn, "choose", is_deterministic=True),
    Task(
        "bowl",
        "noisy quadratic",
        synthetic.BOWL_STEPS,
        synthetic.bowl,
        "choose",
        has_matrices=False,
        is_validated=False,
    ),
    Task("scaled_mlp", "classifier, scaled layers", 5000, images.scaled_mlp, "choose", has_finite_data=True),
    Task(
        "mnist_cnn",
        "convolutional classifier",
        2500,
        images.mnist_cnn,
        "hold out",
        needs_mnist=True,
        has_finite_data=True,
    ),
    Task("lstm", "characters, recurrent", 1500, text.lstm, "hold out", has_finite_data=True),
    Task("words", "words, rare classes", 4000, text.words, "hold out", has_finite_data=True),
    Task("factorisation", "matrix factorisation", 8000, synthetic.factorisation, "hold out", has_finite_data=True),
    Task("rosenbrock", "noisy curved valley", 12_000, synthetic.rosenbrock, "hold out", has_matrices=False),
    Task("drift", "regression, moving target", 8000, synthetic.drift, "hold out"),
    Task("vae", "variational autoencoder", 4000, fresh.vae, "fresh", has_finite_data=True),
    Task("diffusion", "denoises points, layer norms", 4000, fresh.diffusion, "fresh"),
    Task("sorting", "sequences, attention", 2000, fresh.sorting, "fresh"),
)
TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}
SEALED_TASKS: Mapping[str, Task] = {task.name: task for task in generated.SEALED}  # to be run once, so not among TASKS


def get_task(name: str) -> Task:
    """Looks a task up.

    Raises:
        ValueError: no task has that name.
    """
    tasks = {**TASKS, **SEALED_TASKS}
    if name not in tasks:
        raise ValueError(f"task must be one of {', '.join(tasks)}, got {name!r}")
    return tasks[name]
