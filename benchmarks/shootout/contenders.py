"""The optimizers of the comparison: how each is made for a problem, what of it is tuned, where it applies.

Three sorts: those that are tuned on every task, within the ranges that their authors recommend; those that run with one
setting on all tasks ("anchors"), chosen among a few on the tasks to choose on; and LODO, which is run as it is.
docs/peers.md says for each what is searched and why.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import lodo
from benchmarks.schedules import WARMUP
from benchmarks.shootout.problem import Problem, Task
from benchmarks.shootout.spaces import Choice, Range, Space, momentum, rate, second_decay, weight_decay

RECOMMENDED: Mapping[str, Any] = {**lodo.RECOMMENDED, "momentum_decays": list(lodo.RECOMMENDED["momentum_decays"])}
"""What "LODO" is run with, untuned, on every task, `lodo.AutoLODO(params)`; lists, as JSON gives them back."""
SEARCHED_LODO = ("lr", "beta", "weight_decay")  # of the tuned one; all else is as recommended
_AUTO = {*inspect.signature(lodo.AutoLODO).parameters, "preconditioner"}

Options = Mapping[str, Any]
SCHEDULED = Choice(("warmup_cosine", "warmup"))
TRIALS = 40  # of AdamW
PEER_TRIALS = 24
SEEDS, PEER_SEEDS = 5, 3  # final runs: of AdamW, of LODO and of what has one setting; of the other peers
PACKAGE = ("pytorch_optimizer",)
PLAIN_MOMENTUM = 1e6  # of torch's NAdam: its momentum does not warm up


@dataclass(frozen=True)
class Contender:
    """One optimizer.

    Attributes:
        make: the optimizers that step together, from the problem, the hyperparameters, a seed and the number of steps.
        space: what is tuned, "schedule" among it; empty for a contender that is run as it is.
        trials: of the search.
        afterwards: options that are tried on top of the best settings when the search is done, since they cost much.
        relative: a contender with candidates whose one setting is compared with the best trials.
        candidates: settings of which one is taken for all tasks; a contender has these, a space, or neither.
        schedule: where it is not searched.
        seeds: how many final runs it has on each task.
        is_averaging: it is evaluated at an average of the points where it takes gradients.
        uses_closure: `step` calls for as many evaluations as it likes.
        needs_matrices: it does not apply where no matrix is to be trained.
        needs_exact_losses: it applies to deterministic tasks only.
        spares_vectors: its weight decay leaves vectors alone.
        packages: what must be installed besides torch, by the names that they are imported under.
    """

    name: str
    make: Callable[[Problem, Options, int, int], list[Optimizer]]
    space: Space = field(default_factory=dict)
    trials: int = PEER_TRIALS
    afterwards: Options = field(default_factory=dict)
    relative: str = ""
    candidates: Sequence[Options] = ()
    schedule: str = "constant"
    seeds: int = PEER_SEEDS
    is_averaging: bool = False
    uses_closure: bool = False
    needs_matrices: bool = False
    needs_exact_losses: bool = False
    spares_vectors: bool = False
    packages: tuple[str, ...] = ()

    def applies_to(self, task: Task) -> bool:
        if self.needs_exact_losses and not task.is_deterministic:
            return False
        return task.has_matrices or not self.needs_matrices

    def space_of(self, task: Task) -> Space:
        """Weight decay is searched only where data come again and again, so that it may help, and where something
        decays."""
        decays = task.has_finite_data and (task.has_matrices or not self.spares_vectors)
        return {name: each for name, each in self.space.items() if name != "weight_decay" or decays}


def _sgd(problem: Problem, options: Options, seed: int, steps: int) -> list[Optimizer]:
    return [torch.optim.SGD(problem.params, fused=True, **options)]


def _adamw(problem: Problem, options: Options, seed: int, steps: int) -> list[Optimizer]:
    """torch's, or with Nesterov's momentum torch's NAdam, whose momentum is here the same at every step: NAdamW."""
    rest: dict[str, Any] = {
        "lr": options["lr"],
        "betas": (options["beta1"], options["beta2"]),
        "weight_decay": options.get("weight_decay", 0.0),
    }
    if options["nesterov"]:
        rest |= {"momentum_decay": PLAIN_MOMENTUM, "decoupled_weight_decay": True, "foreach": True}
        return [torch.optim.NAdam(problem.params, **rest)]
    return [torch.optim.AdamW(problem.params, fused=True, **rest)]


def hidden_matrices(model: nn.Module, with_head: bool = True) -> list[nn.Parameter]:
    """The parameters that Muon is for: matrices and filters, but not those of embeddings, nor of the last layer if
    `with_head` is false."""
    own = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    found = [param for module in own for param in _own_matrices(module).values()]
    head = [each["weight"] for module in own if "weight" in (each := _own_matrices(module))][-1:]
    return found if with_head else [param for param in found if all(param is not each for each in head)]


def _own_matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in module.named_parameters(recurse=False) if param.ndim >= 2}


def _muon(problem: Problem, options: Options, seed: int, steps: int) -> list[Optimizer]:
    """Muon for the hidden matrices and filters, AdamW with the betas of Muon's authors for the rest."""
    from pytorch_optimizer import Muon  # a large package, only where it is used; torch's own refuses filters

    matrices = hidden_matrices(problem.model, options["head"] == "muon")
    own = set(matrices)
    rest = [param for param in problem.params if param not in own]
    decay = options.get("weight_decay", 0.0)
    group = {"params": matrices, "use_muon": True}
    found: list[Optimizer] = []
    if matrices:
        found.append(Muon([group], lr=options["lr"], momentum=options["momentum"], weight_decay=decay))
    if rest:
        adamw = {"lr": options["adamw_lr"], "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": decay}
        found.append(torch.optim.AdamW(rest, fused=True, **adamw))
    return found


def _is_one_vector(problem: Problem) -> bool:
    """Where there is nothing but vectors, the Kronecker-factored methods get full matrices for them."""
    return all(param.ndim < 2 for param in problem.params)


def _soap(problem: Problem, options: Options, seed: int, steps: int) -> list[Optimizer]:
    from pytorch_optimizer import SOAP

    rest = {
        "betas": (options["beta1"], options["beta2"]),
        "weight_decay": options.get("weight_decay", 0.0),
        "precondition_frequency": options.get("precondition_frequency", 10),
    }
    return [SOAP(problem.params, options["lr"], precondition_1d=_is_one_vector(problem), **rest)]


def _kron(problem: Problem, options: Options, seed: int, steps: int) -> list[Optimizer]:
    from pytorch_optimizer import Kron

    smallest = 1 if _is_one_vector(problem) else 2
    return [Kron(problem.params, precondition_dtype=None, min_ndim_triangular=smallest, **options)]


def _prodigy(problem: Problem, options: Options, seed: int, steps: int) -> list[Optimizer]:
    from pytorch_optimizer import Prodigy

    rest = {"betas": (0.9, options["beta2"]), "weight_decay": options.get("weight_decay", 0.0)}
    # Its authors' advice: lr stays 1, and what is searched under its name is the factor of the estimated distance;
    # beside a warm-up the rate's rise must not count in that estimate.
    return [Prodigy(problem.params, lr=1.0, d_coef=options["lr"], safeguard_warmup=True, **rest)]


def _schedule_free(problem: Problem, options: Options, seed: int, steps: int) -> list[Optimizer]:
    from pytorch_optimizer import ScheduleFreeAdamW

    rest = {"betas": (options["beta1"], options["beta2"]), "weight_decay": options.get("weight_decay", 0.0)}
    return [ScheduleFreeAdamW(problem.params, lr=options["lr"], warmup_steps=round(WARMUP * steps), **rest)]


def _ademamix(problem: Problem, options: Options, seed: int, steps: int) -> list[Optimizer]:
    from pytorch_optimizer import AdEMAMix

    rest = {"betas": (options["beta1"], 0.999, options["beta3"]), "weight_decay": options.get("weight_decay", 0.0)}
    plain = {"alpha": options["alpha"], "weight_decouple": True, "t_alpha_beta3": steps}
    return [AdEMAMix(problem.params, lr=options["lr"], **rest, **plain)]


def _lbfgs(problem: Problem, options: Options, seed: int, steps: int) -> list[Optimizer]:
    return [
        torch.optim.LBFGS(
            problem.params,
            max_iter=1_000_000,  # the budget ends it
            max_eval=10_000_000,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
            lr=options["lr"],
            history_size=round(options["history_size"]),
        )
    ]


def _lodo(problem: Problem, options: Options, seed: int, steps: int) -> list[Optimizer]:
    """AutoLODO where the options say all that it is made of, so that none is its default where LODO's is another."""
    is_auto = options.get("preconditioner") == RECOMMENDED["preconditioner"]
    if is_auto and RECOMMENDED.keys() <= options.keys() <= _AUTO:
        return [lodo.AutoLODO(problem.params, **{key: options[key] for key in options if key != "preconditioner"})]
    return [lodo.LODO(problem.params, seed=seed, **options)]


def _settings(schedules: Sequence[str], **options: Sequence[Any]) -> tuple[Options, ...]:
    """All combinations, the schedule among them."""
    names = ("schedule", *options)
    return tuple(dict(zip(names, values, strict=True)) for values in product(schedules, *options.values()))


_NADAMW = _settings(
    ("warmup_cosine",),
    lr=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    beta1=(0.9, 0.95),
    beta2=(0.99, 0.999),
    weight_decay=(0.0, 0.1),
    nesterov=(True,),
)
_SCHEDULE_FREE = _settings(
    ("constant",), lr=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1), beta1=(0.9, 0.95, 0.98), beta2=(0.999,), weight_decay=(0.0, 0.1)
)
_PRODIGY = _settings(("warmup_cosine", "warmup"), lr=(0.5, 1.0, 2.0), beta2=(0.99, 0.999), weight_decay=(0.0, 0.1))

_ADAM: Space = {
    "lr": rate(1e-4, 1.0, 1e-3),
    "schedule": SCHEDULED,
    "nesterov": Choice((False, True)),
    "beta1": momentum(0.9, ceiling=1.0),
    "beta2": second_decay(0.999),
    "weight_decay": weight_decay(),
}
_ALL = (
    Contender("AdamW", _adamw, _ADAM, TRIALS, relative="NAdamW, calibrated", seeds=SEEDS),
    Contender(
        "SGD",
        _sgd,
        {
            "lr": rate(1e-3, 1.0, 1e-2),
            "schedule": SCHEDULED,
            "nesterov": Choice((True, False)),
            "momentum": momentum(0.9, low=5e-3),
            "weight_decay": weight_decay(1e-2),
        },
    ),
    Contender(
        "Muon",
        _muon,
        {
            "lr": rate(2e-3, 0.2, 2e-2),
            "schedule": SCHEDULED,
            "head": Choice(("adamw", "muon")),
            "momentum": momentum(0.95, high=0.3),
            "adamw_lr": rate(3e-4, 3e-2, 3e-3),
            "weight_decay": weight_decay(),
        },
        needs_matrices=True,
        packages=PACKAGE,
    ),
    Contender(
        "SOAP",
        _soap,
        {
            "lr": rate(3e-4, 0.3, 3e-3),
            "schedule": SCHEDULED,
            "beta1": momentum(0.95),
            "beta2": second_decay(0.95, low=1e-3),
            "weight_decay": weight_decay(),
        },
        afterwards={"precondition_frequency": 1},
        packages=PACKAGE,
    ),
    Contender(
        "PSGD-Kron",
        _kron,
        {
            "lr": rate(1e-4, 0.1, 1e-3),
            "schedule": SCHEDULED,
            "momentum": momentum(0.9),
            "weight_decay": weight_decay(),
        },
        spares_vectors=True,
        packages=(*PACKAGE, "opt_einsum"),  # without the latter torch.einsum builds outer products of the factors
    ),
    Contender(
        "Prodigy",
        _prodigy,
        {
            "lr": rate(0.1, 10.0, 1.0),
            "schedule": SCHEDULED,
            "beta2": second_decay(0.999),
            "weight_decay": weight_decay(),
        },
        relative="Prodigy, calibrated",
        packages=PACKAGE,
    ),
    Contender(
        "schedule-free AdamW",
        _schedule_free,
        {
            "lr": rate(3e-4, 1.0, 2.5e-3),
            "beta1": momentum(0.9),
            "beta2": second_decay(0.999),
            "weight_decay": weight_decay(),
        },
        relative="schedule-free AdamW, calibrated",
        is_averaging=True,
        packages=PACKAGE,
    ),
    Contender(
        "AdEMAMix",
        _ademamix,
        {
            "lr": rate(1e-4, 0.1, 1e-3),
            "schedule": SCHEDULED,
            "beta1": momentum(0.9),
            "beta3": Range(1e-4, 1e-2, 0.999, is_decay=True, floor=1e-5, ceiling=0.1),
            "alpha": Range(1.0, 10.0, 5.0, floor=0.1, ceiling=30.0),
            "weight_decay": weight_decay(),
        },
        packages=PACKAGE,
    ),
    Contender(
        "L-BFGS",
        _lbfgs,
        {"lr": rate(0.1, 10.0, 1.0), "history_size": Range(5, 100, 20, floor=1, ceiling=500)},
        uses_closure=True,
        needs_exact_losses=True,
    ),
    Contender(
        "AdamW, torch's defaults",
        _adamw,
        candidates=_settings(
            ("constant",), lr=(1e-3,), beta1=(0.9,), beta2=(0.999,), weight_decay=(0.01,), nesterov=(False,)
        ),
        seeds=SEEDS,
    ),
    Contender("NAdamW, calibrated", _adamw, candidates=_NADAMW, seeds=SEEDS),
    Contender(
        "schedule-free AdamW, calibrated",
        _schedule_free,
        candidates=_SCHEDULE_FREE,
        seeds=SEEDS,
        is_averaging=True,
        packages=PACKAGE,
    ),
    Contender("Prodigy, calibrated", _prodigy, candidates=_PRODIGY, seeds=SEEDS, packages=PACKAGE),
    Contender("LODO", _lodo, seeds=SEEDS),
    Contender("LODO, averages", _lodo, seeds=SEEDS, is_averaging=True),
    Contender("LODO, cooldown", _lodo, seeds=SEEDS, schedule="cooldown"),
    Contender(
        "LODO, tuned",
        _lodo,
        {
            "lr": rate(1e-5, 0.1, 1e-3),
            "schedule": Choice(("constant", "warmup_cosine")),
            "beta": momentum(0.9),
            "weight_decay": weight_decay(),
        },
    ),
)
CONTENDERS: Mapping[str, Contender] = {contender.name: contender for contender in _ALL}
UNTUNED, TUNED, REFERENCE = "LODO", "LODO, tuned", "AdamW"
WITH_END: Mapping[str, Options] = {"LODO, averages": {"average_share": 0.1}, "LODO, cooldown": {}}
"""Untuned LODO, evaluated at averages of its iterates, or told when the training ends; and its options beside."""
CLOCK, ANCHOR = "AdamW, torch's defaults", "NAdamW, calibrated"
"""Whose runs are the unit of seconds, for torch's is fused; and what untuned LODO has to be compared with."""


def get_contender(name: str) -> Contender:
    """Looks a contender up.

    Raises:
        ValueError: no contender has that name.
    """
    if name not in CONTENDERS:
        raise ValueError(f"contender must be one of {'; '.join(CONTENDERS)}, got {name!r}")
    return CONTENDERS[name]


def fixed_options(name: str, recommended: Options) -> dict[str, Any]:
    """What of the recommended call of LODO a contender's hyperparameters begin with."""
    if name == UNTUNED or name in WITH_END:
        return {**recommended, **WITH_END.get(name, {})}
    if name == TUNED:
        return {key: value for key, value in recommended.items() if key not in SEARCHED_LODO}
    return {}
