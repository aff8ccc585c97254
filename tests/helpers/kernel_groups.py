"""A param group after some steps, which the compiled passes and plain torch can take the next one of."""

import functools

import pytest
import torch

from lodo import inner_optimizer
from lodo.context import Cohort, Context
from lodo.options import OPTIONS
from lodo.parts import Layout, Momentum, parts_of
from lodo.parts.tensor_scale import LARGEST_LOG
from lodo.preconditioners import Composite, Identity, LogDiagonal
from lodo.update import Fused, Plain

DTYPES = (torch.float32, torch.float64)
DECAYS = (0.0, 0.3, 0.9, 0.999)  # forgetting more than half a momentum in a step, and less
LENGTHS = {
    "one": [1],
    "less than a chunk": [2047],
    "a chunk": [2048],
    "more than a chunk": [2049],
    "several": [0, 1, 2047, 0, 2049, 3, 9000, 0],
    "several threads": [2**17 + 5, 3, 0, 70_001],
}
FIRST = Cohort((), True, True, steps=7, age=7, inner_steps=7, last_lr=0.3, lr=0.7, scheduled_lr=0.2)
COHORTS = {
    "one cohort": (FIRST,),
    "several cohorts": (
        FIRST,
        FIRST._replace(active=False, learning=False, steps=12, age=4, inner_steps=11, last_lr=0.5, lr=0.3),
        FIRST._replace(steps=1, age=1, inner_steps=1, last_lr=0.0, lr=0.9),
        FIRST._replace(steps=50_000, age=40_000, inner_steps=30_000, last_lr=0.02, lr=0.01, scheduled_lr=1.0),
        FIRST._replace(active=False, learning=False, steps=0, age=0, inner_steps=0, last_lr=0.0, scheduled_lr=0.0),
    ),
}
sizes = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)
MANY = [(lengths, COHORTS["one cohort"]) for lengths in LENGTHS.values()]
MANY += [(LENGTHS[name], COHORTS["several cohorts"]) for name in ("several", "several threads")]
partitions = pytest.mark.parametrize(
    ("lengths", "cohorts"), MANY, ids=[*LENGTHS, "several, in cohorts", "several threads, in cohorts"]
)
several = pytest.mark.parametrize("lengths", [LENGTHS["several"], LENGTHS["several threads"]], ids=["small", "large"])
each_partition = pytest.mark.parametrize("cohorts", COHORTS.values(), ids=COHORTS)
each_update = pytest.mark.parametrize("update", [Fused, Plain])


def random(*shape, dtype=torch.float64, seed=0):
    return drawn(shape, seed).to(dtype, copy=True)


@functools.cache
def drawn(shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def table(count, *shape, seed=0):
    """What `descend_` advances, after some steps, of so many parameters: its second moments are positive."""
    found = random(count, inner_optimizer.ROWS, *shape, seed=seed)
    found[:, 2].square_().add_(0.1)
    return found


def agree(found, expected, roundings=20):
    """Equal to a few roundings of the largest number."""
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    tolerance = roundings * torch.finfo(expected.dtype).eps * scale
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def agree_in_tables(found, expected, tolerance):
    """The same in each row of tables (k, rows, ...), to some share of its largest number."""
    for row, other in zip(found.unbind(1), expected.unbind(1), strict=True):
        torch.testing.assert_close(row, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


def with_threads(count, work):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        return work()
    finally:
        torch.set_num_threads(before)


class Group:
    """A param group with some parts after some steps, the gradient of the next one, and what takes it: `Fused`, or
    `Plain`. Whoever asks for float32 in a `wide` form gets the same numbers in float64. Of the parameters each belongs
    to one of the cohorts by turns."""

    def __init__(
        self,
        lengths,
        dtype,
        update=Fused,
        wide=False,
        *,
        base="adam",
        scale=True,
        mixture=True,
        network="log_diagonal",
        inner="adam",
        unit=1.0,
        largest_log=100.0,  # beyond the bound: S must have an inverse
        cohorts=COHORTS["one cohort"],
        as_numbers=lambda number: number,
        **options,
    ):
        n, k, used = sum(lengths), len(lengths), torch.float64 if wide else dtype

        def vectors(*shape, seed):
            return random(*shape, dtype=dtype, seed=seed).to(used)

        self.lengths, self.g = lengths, vectors(n, seed=1)
        self.options = {name: option.default for name, option in OPTIONS.items()}
        self.options |= {"meta_lr": 0.02, "meta_optimizer": inner, "trace_decay": 0.7, "mix_lr": 0.3, "base": base}
        self.options |= {
            "preconditioner": network,
            "scale_lr": 0.3 * scale,
            "momentum_decays": (mixture and DECAYS) or None,
        }
        self.options |= options
        square = random(n, seed=10).clamp_(-2, 2).mul_(7).exp_().to(dtype).to(used)
        square[1::3] = 0
        logs = table(k, seed=7)
        logs[-2:, 0] = torch.tensor([-largest_log, largest_log])[-k:]
        self.tensors = {
            "momentum": vectors(n, seed=2),
            "momentum_trace": vectors(n, seed=3),
            "exp_avg_sq": square,
            "unit": torch.full((k,), unit, dtype=torch.float64),
            "scale": logs,
            "scale_peak": logs[:, 0].clamp(-LARGEST_LOG, LARGEST_LOG).exp() * random(k, seed=11).exp().add_(1),
            "trace_peak": torch.zeros(k, dtype=torch.float64),
            "progress": random(k, seed=14).mul_(2).clamp_(-0.95, 0.95),
            "step_trace": vectors(n, seed=12),
            "momenta": vectors(len(DECAYS), n, seed=8),
            "mixture": table(k, len(DECAYS), seed=9),
            "recent_energy": random(k, seed=15).mul_(4).add_(8).exp_() * (torch.arange(k) % 3 > 0),  # or none yet
            "written": vectors(n, seed=13),
            "scheduled_lr": torch.zeros(k, dtype=torch.float64),
            "reset_at": torch.zeros(k, dtype=torch.int64),
        }
        if self.options["trace_decay"] == 0:
            del self.tensors["momentum_trace"]
        shapes = [torch.Size([length]) for length in lengths]
        layout = Layout(shapes, [used] * k, used, torch.device("cpu"))
        parts = [kind(layout, self.tensors, self.options) for kind in parts_of(self.options)]
        self.momentum = next(part for part in parts if isinstance(part, Momentum))
        self.is_learned = network == "log_diagonal"
        self.network = LogDiagonal.wrap(vectors(n, seed=4), None, n) if self.is_learned else Identity(n, used)
        self.moments = None
        if self.is_learned and inner == "adam":
            self.moments = vectors(n, seed=5), vectors(n, seed=6).square_().add_(0.1)
            if self.options["meta_state_dtype"] == "bfloat16":
                self.moments = tuple(moment.bfloat16() for moment in self.moments)
        factors = [part for part in parts if part.is_factor]
        self.operator = Composite(self.network, factors)
        self.update = update(self.operator, self.network, self.moments, self.momentum, parts, lengths)
        self.scale = next((part for part in parts if type(part).__name__ == "TensorScale"), None)
        places = [tuple(range(number, k, len(cohorts))) for number in range(len(cohorts))]
        each = [own._replace(places=found) for own, found in zip(cohorts, places, strict=True) if found]
        self.cohorts = [
            own._replace(**{name: as_numbers(value) for name, value in own._asdict().items() if name != "places"})
            for own in each
        ]
        self.as_numbers, self.unit = as_numbers, as_numbers(unit)
        self.update.refresh_(self.context(is_resting=True))

    def context(self, *, is_resting=False, learning=True, idle=None, lr=0.15, **changes):
        """Of the next step, or between two."""
        found = [cohort._replace(**changes) for cohort in self.cohorts]
        found = [own._replace(learning=own.learning & learning) for own in found]
        if is_resting:
            found = [
                own._replace(steps=own.steps - 1 * own.active, active=own.active & False, learning=own.learning & False)
                for own in found
            ]
        flags = any(own.active for own in found), any(own.learning for own in found)
        active, learning = (self.as_numbers(bool(flag)) for flag in flags)
        numbers = {"lr": self.as_numbers(lr), "last_lr": found[0].last_lr, "unit": self.unit}
        return Context(self.options, self.lengths, found, active, learning, **numbers, idle=idle)

    def step(self, **changes):
        """Takes one, and returns it."""
        at = self.context(**changes)
        self.update.begin_(at)
        self.update.learn_parts_(self.g, at)
        self.update.learn_(self.g, at)
        return self.update.advance_(self.g, at)

    def kept(self):
        """Copies of all that a step changes, by the names of the state."""
        exp_avg, exp_avg_sq = self.moments or (None, None)
        theta = self.network.theta if self.network.learns else None
        of_network = {"theta": theta, "theta_exp_avg": exp_avg, "theta_exp_avg_sq": exp_avg_sq}
        tensors = {**self.tensors, **of_network}
        return {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}

    def own(self, name, tensor, place):
        """What a parameter has of a tensor of the group."""
        of_parameters = (
            *("unit", "scheduled_lr", "reset_at"),
            *("scale", "scale_peak", "trace_peak", "progress", "mixture", "recent_energy"),
        )
        return tensor[place] if name in of_parameters else tensor.split(self.lengths, dim=-1)[place]

    def is_active(self):
        """Of each element."""
        found = torch.zeros(sum(self.lengths), dtype=torch.bool)
        for cohort in self.cohorts:
            for place in cohort.places:
                found.split(self.lengths)[place].fill_(bool(cohort.active))
        return found

    def gains(self):
        """The diagonal of G / lr."""
        return self.operator.apply(torch.ones_like(self.g))


def both(*arguments, **options):
    """The same group in the two forms."""
    return Group(*arguments, **options), Group(*arguments, update=Plain, **options)
