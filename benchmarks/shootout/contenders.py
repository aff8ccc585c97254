"""The optimizers of the comparison: how each is made for a problem, what of it is tuned, where it applies.

Every contender's search begins with a scan of its learning rate, so all ranges are wide; weight decay is 0 throughout,
since the training loss is what is compared.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

import lodo
from benchmarks.shootout.problem import Problem, Task

RECOMMENDED: Mapping[str, Any] = {**lodo.RECOMMENDED, "momentum_decays": list(lodo.RECOMMENDED["momentum_decays"])}
"""What "LODO" is run with, untuned, on every task, `lodo.AutoLODO(params)`; lists, as JSON gives them back."""
SEARCHED_LODO = ("lr", "beta")  # of the tuned one; all else is as recommended
_AUTO = {*inspect.signature(lodo.AutoLODO).parameters, "preconditioner"}

Options = Mapping[str, Any]
BOTH = ("constant", "cosine")
TRIALS = 12  # of AdamW, SGD and LODO, with each schedule
PEER_TRIALS = 8


@dataclass(frozen=True)
class Range:
    """Where a hyperparameter is searched, log-uniformly.

    Attributes:
        default: what it is while the learning rate is scanned.
        is_decay: the number is 1 minus what is searched, as for a momentum.
    """

    low: float
    high: float
    default: float
    is_decay: bool = False

    def value(self, position: float) -> float:
        return 1 - position if self.is_decay else position

    @property
    def start(self) -> float:
        return 1 - self.default if self.is_decay else self.default


@dataclass(frozen=True)
class Contender:
    """One optimizer.

    Attributes:
        make: the optimizers that step together, from the problem and the hyperparameters.
        space: what is tuned; empty for a contender that is run as it is.
        trials: of the search, with each of `schedules`.
        is_averaging: its loss is to be taken at an average of the points where it takes gradients.
        uses_closure: `step` calls for as many evaluations as it likes.
        needs_matrices: it does not apply where no matrix is to be trained.
        needs_exact_losses: it applies to deterministic tasks only.
    """

    name: str
    make: Callable[[Problem, Options, int], list[Optimizer]]
    space: Mapping[str, Range] = field(default_factory=dict)
    trials: int = PEER_TRIALS
    schedules: Sequence[str] = BOTH
    is_averaging: bool = False
    uses_closure: bool = False
    needs_matrices: bool = False
    needs_exact_losses: bool = False

    def applies_to(self, task: Task) -> bool:
        if self.needs_exact_losses and not task.is_deterministic:
            return False
        return task.has_matrices or not self.needs_matrices


def _sgd(problem: Problem, options: Options, seed: int) -> list[Optimizer]:
    return [torch.optim.SGD(problem.params, fused=True, **options)]


def _adamw(problem: Problem, options: Options, seed: int) -> list[Optimizer]:
    rest = {"lr": options["lr"], "betas": (options["beta1"], options["beta2"])}
    return [torch.optim.AdamW(problem.params, weight_decay=0.0, fused=True, **rest)]


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that Muon is for: matrices, but not those of embeddings."""
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return [param for param in model.parameters() if param.ndim == 2 and param not in embeddings]


class _WithoutBfloat16(TorchFunctionMode):
    """Inside, `tensor.bfloat16()` is a copy of the tensor in its own dtype."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Options | None = None
    ) -> Any:
        if func is torch.Tensor.bfloat16:
            return args[0].clone()
        return func(*args, **(kwargs or {}))


class Muon(torch.optim.Muon):
    """torch's, but orthogonalised in the parameters' dtype.

    A CPU without instructions for bfloat16, which torch casts to, takes some six times as long for a step in it.
    """

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        with _WithoutBfloat16():
            loss: float | None = super().step(closure)
        return loss


def _muon(problem: Problem, options: Options, seed: int) -> list[Optimizer]:
    """Muon for the matrices, with steps as long as AdamW's, which has the rest at the same learning rate."""
    matrices = hidden_matrices(problem.model)
    own = set(matrices)
    rest = [param for param in problem.params if param not in own]
    muon = Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw", **options)
    others: list[Optimizer] = [torch.optim.AdamW(rest, lr=options["lr"], weight_decay=0.0, fused=True)] if rest else []
    return [muon, *others]


def _is_one_vector(problem: Problem) -> bool:
    """Where there is nothing but vectors, the Kronecker-factored methods get full matrices for them."""
    return all(param.ndim < 2 for param in problem.params)


def _soap(problem: Problem, options: Options, seed: int) -> list[Optimizer]:
    from pytorch_optimizer import SOAP  # a large package, only where it is used

    betas = (options["beta1"], options["beta2"])
    return [SOAP(problem.params, options["lr"], betas, weight_decay=0.0, precondition_1d=_is_one_vector(problem))]


def _kron(problem: Problem, options: Options, seed: int) -> list[Optimizer]:
    from pytorch_optimizer import Kron

    smallest = 1 if _is_one_vector(problem) else 2
    return [Kron(problem.params, precondition_dtype=None, min_ndim_triangular=smallest, **options)]


def _prodigy(problem: Problem, options: Options, seed: int) -> list[Optimizer]:
    from pytorch_optimizer import Prodigy

    return [Prodigy(problem.params, lr=options["lr"], betas=(0.9, options["beta2"]))]


def _schedule_free(problem: Problem, options: Options, seed: int) -> list[Optimizer]:
    from pytorch_optimizer import ScheduleFreeAdamW

    return [ScheduleFreeAdamW(problem.params, lr=options["lr"], betas=(options["beta1"], 0.999))]


def _lbfgs(problem: Problem, options: Options, seed: int) -> list[Optimizer]:
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


def _lodo(problem: Problem, options: Options, seed: int) -> list[Optimizer]:
    """AutoLODO where the options say all that it is made of, so that none is its default where LODO's is another."""
    is_auto = options.get("preconditioner") == RECOMMENDED["preconditioner"]
    if is_auto and RECOMMENDED.keys() <= options.keys() <= _AUTO:
        return [lodo.AutoLODO(problem.params, **{key: options[key] for key in options if key != "preconditioner"})]
    return [lodo.LODO(problem.params, seed=seed, **options)]


_MOMENTUM = Range(1e-2, 1.0, 0.9, is_decay=True)
_BETA1 = Range(1e-2, 0.5, 0.9, is_decay=True)
_BETA2 = Range(1e-3, 0.1, 0.999, is_decay=True)
_ADAM_LR = Range(1e-4, 10.0, 1e-3)

_ALL = (
    Contender("AdamW", _adamw, {"lr": _ADAM_LR, "beta1": _BETA1, "beta2": _BETA2}, TRIALS),
    Contender("SGD", _sgd, {"lr": Range(1e-4, 10.0, 1e-2), "momentum": _MOMENTUM}, TRIALS),
    Contender("Muon", _muon, {"lr": Range(1e-4, 1.0, 1e-2), "momentum": _MOMENTUM}, needs_matrices=True),
    Contender("SOAP", _soap, {"lr": Range(1e-4, 1.0, 3e-3), "beta1": _BETA1, "beta2": Range(1e-3, 0.1, 0.95, True)}),
    Contender("PSGD-Kron", _kron, {"lr": Range(1e-4, 1.0, 1e-3), "momentum": _MOMENTUM}),
    Contender("Prodigy", _prodigy, {"lr": Range(1e-2, 10.0, 1.0), "beta2": _BETA2}),
    Contender(
        "schedule-free AdamW",
        _schedule_free,
        {"lr": Range(1e-4, 10.0, 2.5e-3), "beta1": Range(1e-2, 0.5, 0.9, is_decay=True)},
        schedules=("constant",),
        is_averaging=True,
    ),
    Contender(
        "L-BFGS",
        _lbfgs,
        {"lr": Range(1e-2, 10.0, 1.0), "history_size": Range(5, 100, 20)},
        schedules=("constant",),
        uses_closure=True,
        needs_exact_losses=True,
    ),
    Contender("LODO", _lodo, schedules=("constant",), trials=0),
    Contender(
        "LODO, tuned",
        _lodo,
        {"lr": Range(1e-5, 1e-1, 1e-3), "beta": _MOMENTUM},
        TRIALS,
    ),
)
CONTENDERS: Mapping[str, Contender] = {contender.name: contender for contender in _ALL}
UNTUNED, TUNED, REFERENCE = "LODO", "LODO, tuned", "AdamW"


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
    if name == UNTUNED:
        return dict(recommended)
    if name == TUNED:
        return {key: value for key, value in recommended.items() if key not in SEARCHED_LODO}
    return {}
