"""Sealed tasks, whose structure is drawn from a number: six kinds that differ from each other and from the other tasks.

`SEALED` is drawn from `SEALED_SEED`, which was fixed before the defaults of the next versions are chosen. These
tasks are to be run once, when the defaults are settled: until then nobody trains on them, looks at their curves, or
chooses by them what there is to draw from. That was chosen on tasks of other seeds, with AdamW at a rate of 1e-3
alone, such that a run takes it some two to eight seconds on one thread and ends well below standing still. A change
to what is drawn breaks the seal; a test has the digest of it.
"""

from benchmarks.shootout.generated.design import Design
from benchmarks.shootout.generated.images import Images, Restoration
from benchmarks.shootout.generated.rows import Regression, Retrieval
from benchmarks.shootout.generated.sequences import Characters, Sequences
from benchmarks.shootout.problem import Task

__all__ = ["SEALED", "SEALED_SEED", "draw_tasks"]

SEALED_SEED = 20261128
DESIGNS: tuple[type[Design], ...] = (Regression, Images, Characters, Sequences, Restoration, Retrieval)


def draw_tasks(seed: int) -> tuple[Task, ...]:
    """Six tasks, one of each kind, that follow from the seed; data are read when they are built."""
    designs = (design.drawn(seed) for design in DESIGNS)
    return tuple(design.as_task(f"sealed_{number}_{design.title}") for number, design in enumerate(designs, 1))


SEALED = draw_tasks(SEALED_SEED)
