"""What users do to parameters, gradients and options between steps: `lodo.AutoLODO` at its defaults, AdamW and SOAP.

    python -m benchmarks.in_use                       # all rows, some six minutes on one thread
    python -m benchmarks.in_use --only NAME,NAME      # rows whose names contain one of these

Each row is a small training at a fixed seed. Its loss is that on a large held batch of the same distribution, unscaled,
the mean over the last tenth of the steps. AdamW and SOAP (`pytorch_optimizer`) are run with each of five learning
rates, and the one that ends best is shown. Schedules multiply the learning rate. Writes in_use.jsonl, a line for each
row, and made of these in_use.md, which goes into docs/reliability.md too if all rows are in the usual folder.
"""

import argparse
import copy
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer, lr_scheduler

import lodo
from benchmarks.environment import environment
from examples.image_data import ImageData, digits

OUT = Path(__file__).parent / "results" / "in_use"
DOCS = Path(__file__).parents[1] / "docs" / "reliability.md"
MARKS = ("<!-- in_use: begin -->", "<!-- in_use: end -->")
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
TAIL = 0.1  # share of the steps, at the end, whose mean loss counts
HELD = 512  # examples of the batch that it is taken on
WORSE = 1.5  # times AdamW's loss: from there on a row is marked **moved**
MOVED = 1e-6  # and from there on untouched entries have moved
CHANGE = 10_000  # the step at which labels change

Batch = tuple[Tensor, Tensor]
Result = dict[str, Any]
Record = dict[str, Any]


# ---- problems -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A model, `batch` examples at a time from a generator at a step, and the loss of its outputs."""

    model: nn.Module
    draw: Callable[[torch.Generator, int, int], Batch]
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    batch: int = 64


def mlp(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(sizes):
        layers += [nn.Linear(wide, narrow), activation()]
    return nn.Sequential(*layers[:-1])


@cache
def _digits() -> ImageData:
    return digits()


def classifier(hidden: Sequence[int] = (64,), batch: int = 64, dead: int = 0) -> Problem:
    """Scikit-learn's digits with fresh noise on the pixels, of which the first `dead` are zero."""
    data = _digits()

    def draw(generator: torch.Generator, step: int, count: int) -> Batch:
        picks = torch.randint(len(data.train_images), (count,), generator=generator)
        x = data.train_images[picks] + 0.5 * torch.randn(count, 64, generator=generator)
        x[:, :dead] = 0
        return x, data.train_labels[picks]

    return Problem(mlp(64, *hidden, 10), draw, batch=batch)


def regression(examples: int = 256, noise: float = 0.0, width: int = 32) -> Problem:
    """Tanh networks on a fixed set, inputs of sizes 0.1 to 3; the held examples are new ones without noise if the set
    has noise, else the set itself."""
    teacher, student = mlp(8, 16, 1, activation=nn.Tanh), mlp(8, width, width, 1, activation=nn.Tanh)
    sizes = torch.logspace(-1, 0.5, 8)
    for p in teacher.parameters():
        p.requires_grad_(False).mul_(3)
    x = torch.randn(examples, 8) * sizes
    y = teacher(x) + noise * torch.randn(examples, 1)
    new = torch.randn(HELD, 8) * sizes

    def draw(generator: torch.Generator, step: int, count: int) -> Batch:
        return (new, teacher(new)) if noise and count == HELD else (x, y)

    return Problem(student, draw, F.mse_loss)


class Factors(nn.Module):
    def __init__(self, rows: int, rank: int, columns: int) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.rand(rows, rank)), nn.Parameter(torch.rand(rank, columns))

    def forward(self, x: Tensor) -> Tensor:
        return self.left @ self.right


def factorisation() -> Problem:
    """Factors of a matrix that is the product of sparse non-negative ones, with some noise."""
    true = [torch.rand(shape) * (torch.rand(shape) < 0.5) for shape in ((60, 8), (8, 40))]
    target = true[0] @ true[1] + 0.01 * torch.randn(60, 40)
    return Problem(Factors(60, 8, 40), lambda generator, step, count: (target, target), F.mse_loss)


TOKENS, CONTEXT, PADDING = 60, 8, 0  # bytes 1 to 60 occur


def bytes_model() -> Problem:
    """The next of 256 bytes from the eight before, some of them padding; one of 60 bytes follows two, with noise."""
    successor = torch.randint(1, TOKENS + 1, (TOKENS + 1, TOKENS + 1))

    def draw(generator: torch.Generator, step: int, count: int) -> Batch:
        text = torch.randint(1, TOKENS + 1, (count, CONTEXT + 1), generator=generator)
        for place in range(2, CONTEXT + 1):
            follows = torch.rand(count, generator=generator) < 0.8
            text[:, place] = torch.where(
                follows, successor[text[:, place - 2] // 8, text[:, place - 1]], text[:, place]
            )
        x, y = text[:, :CONTEXT].clone(), text[:, CONTEXT]
        starts = torch.randint(0, CONTEXT - 1, (count, 1), generator=generator)
        return x.masked_fill_(torch.arange(CONTEXT) < starts, PADDING), y

    embedding = nn.Embedding(256, 16, padding_idx=PADDING)
    return Problem(nn.Sequential(embedding, nn.Flatten(), *mlp(16 * CONTEXT, 64, 256)), draw)


def changing_labels() -> Problem:
    """Four classes of points, which change at step CHANGE."""
    teacher = torch.randn(8, 4)

    def draw(generator: torch.Generator, step: int, count: int) -> Batch:
        x = torch.randn(count, 8, generator=generator)
        y = (x @ teacher).argmax(1)
        return x, (y + 1) % 4 if step >= CHANGE else y

    return Problem(mlp(8, 16, 4), draw, batch=16)


PROBLEMS: Mapping[str, Callable[[], Problem]] = {
    "digits": classifier,
    "regression": regression,
    "factorisation": factorisation,
    "bytes": bytes_model,
    "dead pixels": partial(classifier, dead=8),
    "batch of 1": partial(classifier, hidden=(128,), batch=1),
    "deep": partial(classifier, hidden=(256,) * 15, batch=32),
    "changing labels": changing_labels,
    "few noisy examples": partial(regression, examples=64, noise=0.3, width=64),
}


# ---- what users do --------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A training, as the habits see it: `kept` is theirs, `moved` what they measure."""

    model: nn.Module
    optimizer: Optimizer
    steps: int
    step: int = 0
    loss: float = math.nan
    moved: float | None = None
    kept: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.params = list(self.model.parameters())
        self.lr = float(self.optimizer.param_groups[0]["lr"])

    @property
    def matrices(self) -> list[nn.Parameter]:
        return [p for p in self.params if p.ndim > 1]

    def is_at(self, share: float) -> bool:
        return self.step == round(share * self.steps)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What is kept under a name, made when it is asked for first."""
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]

    def copies(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr


Hook = Callable[[Run], None]


def nothing(run: Run) -> None:
    pass


def no_masks(run: Run) -> list[tuple[Tensor, Tensor]]:
    return []


@dataclass(frozen=True)
class Habit:
    """What is done before the forward pass, to the loss, to gradients, and after the step (without gradients of its
    own); and which entries have no gradient, as pairs of a parameter and a mask that is true there."""

    before: Hook = nothing
    scale: Callable[[Run], float] = lambda run: 1.0
    gradients: Hook = nothing
    after: Hook = nothing
    untouched: Callable[[Run], list[tuple[Tensor, Tensor]]] = no_masks
    batches: int = 1


def each(change: Callable[[Tensor], object], only_matrices: bool = False) -> Habit:
    """Changes parameters after each step."""

    def after(run: Run) -> None:
        for p in run.matrices if only_matrices else run.params:
            change(p)

    return Habit(after=after)


def first(change: Callable[[Tensor], object]) -> Habit:
    """Changes the first matrix after each step."""
    return Habit(after=lambda run: void(change(run.matrices[0])))


def void(value: object) -> None:
    pass


def in_box(bound: float) -> Habit:
    return each(lambda p: p.clamp_(-bound, bound))


def times(factor: float) -> Habit:
    return Habit(scale=lambda run: factor)


def random_masks(run: Run, share: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(p.shape, generator=generator) < share for p in run.matrices]


def prune(run: Run) -> None:
    for p, keep in zip(run.matrices, run.once("masks", lambda: random_masks(run, 0.3)), strict=True):
        p.mul_(keep)


def masked(mask_of: Callable[[Run], Tensor]) -> Habit:
    """Gradients of the first matrix that are set to zero where a mask is true."""

    def untouched(run: Run) -> list[tuple[Tensor, Tensor]]:
        return [(run.matrices[0], run.once("mask", lambda: mask_of(run)))]

    def gradients(run: Run) -> None:
        grad = run.matrices[0].grad
        assert grad is not None
        grad.masked_fill_(run.kept["mask"], 0)

    return Habit(gradients=gradients, untouched=untouched)


def block_mask(run: Run, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
    mask = torch.zeros(run.matrices[0].shape, dtype=torch.bool)
    mask[rows, columns] = True
    return mask


def unused_tokens(run: Run) -> list[tuple[Tensor, Tensor]]:
    mask = torch.ones_like(run.matrices[0], dtype=torch.bool)
    mask[1 : TOKENS + 1] = False
    return [(run.matrices[0], mask)]


def averaged(run: Run) -> list[Tensor]:
    """The moving average of the parameters, this step taken in."""
    average: list[Tensor] = run.once("average", run.copies)
    torch._foreach_lerp_(average, [p.detach() for p in run.params], 0.02)
    return average


def swap_average(run: Run) -> None:
    average = averaged(run)
    if run.step % 25 == 0:
        own = run.copies()
        for values in (average, own):
            torch._foreach_copy_([p.detach() for p in run.params], values)


def write_average(run: Run) -> None:
    average = averaged(run)
    if run.step % 100 == 99:
        torch._foreach_copy_([p.detach() for p in run.params], average)


def look_ahead(run: Run) -> None:
    slow: list[Tensor] = run.once("slow", run.copies)
    if run.step % 5 == 4:
        fast = [p.detach() for p in run.params]
        torch._foreach_lerp_(slow, fast, 0.5)
        torch._foreach_copy_(fast, slow)


def reinitialise(run: Run) -> None:
    if run.is_at(0.5):
        last = [module for module in run.model.modules() if isinstance(module, nn.Linear)][-1]
        last.reset_parameters()


def rewind(run: Run) -> None:
    if run.is_at(0.3):
        run.kept["model"] = copy.deepcopy(run.model.state_dict())
    if run.is_at(0.6):
        run.model.load_state_dict(run.kept["model"])


def new_tensors(run: Run) -> None:
    if run.step % 10 == 0:
        for p in run.params:
            p.data = p.data.clone()


def schedule(factor: Callable[[Run], float]) -> Habit:
    """The learning rate times a factor."""
    return Habit(before=lambda run: run.set_lr(run.lr * factor(run)))


def warm_up(run: Run) -> float:
    return min(max(run.step - 20, 0) / 100, 1.0)


def restarts(run: Run) -> None:
    scheduler = run.once("scheduler", lambda: lr_scheduler.CosineAnnealingWarmRestarts(run.optimizer, run.steps // 4))
    scheduler.step()


def plateau(run: Run) -> None:
    make = partial(lr_scheduler.ReduceLROnPlateau, run.optimizer, factor=0.5, patience=20)
    run.once("scheduler", make).step(run.loss)


SWEEP = 100  # steps of a finder of learning rates, from 1e-6 to 1


def find_lr(run: Run) -> None:
    """Raises the rate until the loss is four times the best one; then model and rate are restored, no optimizer."""
    if run.step == 0:
        run.kept |= {"model": copy.deepcopy(run.model.state_dict()), "best": math.inf, "finds": True}
    elif run.kept["finds"]:
        run.kept["best"] = min(run.kept["best"], run.loss)
        if run.step == SWEEP or not run.loss <= 4 * run.kept["best"]:
            run.kept["finds"] = False
            run.model.load_state_dict(run.kept["model"])
    run.set_lr(1e-6 ** (1 - run.step / SWEEP) if run.kept["finds"] else run.lr)


def distance(run: Run, start: Sequence[Tensor], params: Sequence[Tensor]) -> float:
    """How far parameters have gone, relative to their norm."""
    size = torch.stack(torch._foreach_norm(list(start))).norm()
    return float(torch.stack(torch._foreach_norm(torch._foreach_sub(list(params), list(start)))).norm() / size)


def watch_coasting(run: Run) -> None:
    """From step 199 on, after which 500 gradients are zero."""
    if run.step == 199:
        run.kept["start"] = run.copies()
    if run.step == 699:
        run.moved = distance(run, run.kept["start"], [p.detach() for p in run.params])


def freeze(run: Run) -> None:
    """The first matrix, for the middle third."""
    p = run.matrices[0]
    if run.is_at(1 / 3):
        run.kept["start"] = p.detach().clone()
        p.requires_grad_(False).grad = None
    if run.is_at(2 / 3):
        run.moved = distance(run, [run.kept["start"]], [p.detach()])
        p.requires_grad_(True)


def clip(run: Run) -> None:
    nn.utils.clip_grad_norm_(run.params, 0.1)


def reset(run: Run) -> None:
    if run.step == CHANGE and isinstance(run.optimizer, lodo.LODO):
        run.optimizer.reset()


@dataclass(frozen=True)
class Row:
    """One training.

    Attributes:
        dtype: of model and inputs.
        options: of all optimizers.
        peers: the row of which AdamW and SOAP are those of this one, as what is done concerns LODO alone.
    """

    name: str
    problem: str = "digits"
    habit: Habit = field(default_factory=Habit)
    steps: int = 600
    dtype: torch.dtype = torch.float32
    options: Mapping[str, Any] = field(default_factory=dict)
    peers: str | None = None

    @property
    def key(self) -> str:
        return f"{self.name} ({self.problem})"


def _rows() -> Iterator[Row]:
    for problem in ("digits", "regression", "factorisation"):
        yield Row("nothing", problem)
    for problem, bound in (("digits", 0.1), ("regression", 0.3)):
        yield Row(f"clamp to [-{bound}, {bound}]", problem, in_box(bound))
    yield Row("clamp at 0, non-negative factors", "factorisation", each(lambda p: p.clamp_(min=0)), 1000)
    yield Row("max_norm, rows of at most 0.5", habit=each(lambda p: p.copy_(p.renorm(2, 0, 0.5)), True))
    yield Row("rows of the first layer normalised", habit=first(lambda p: p.copy_(F.normalize(p))))
    yield Row("weights masked, 70 % pruned", habit=Habit(after=prune))
    yield Row("gradients masked: rows", habit=masked(partial(block_mask, rows=slice(16))))
    yield Row("gradients masked: columns", habit=masked(partial(block_mask, columns=slice(16))))
    yield Row("gradients masked: scattered", habit=masked(lambda run: random_masks(run, 0.3)[0]))
    yield Row(
        "dead inputs",
        "dead pixels",
        Habit(untouched=lambda run: [(run.matrices[0], block_mask(run, columns=slice(8)))]),
    )
    yield Row("padding row and unused tokens", "bytes", Habit(untouched=unused_tokens), 300)
    yield Row("60 of 256 bytes used", "bytes", steps=1000)
    yield Row("average swapped in to evaluate, and back", habit=Habit(after=swap_average))
    for problem in ("digits", "regression"):
        yield Row("average written back for good", problem, Habit(after=write_average))
        yield Row("Lookahead, k = 5, alpha = 0.5", problem, Habit(after=look_ahead))
    yield Row("last layer reinitialised half-way", habit=Habit(after=reinitialise))
    yield Row("model alone loaded from a checkpoint", habit=Habit(after=rewind))
    yield Row("p.data = p.data.clone()", habit=Habit(after=new_tensors))
    for problem in ("digits", "regression"):
        yield Row(
            "lr x 100 half-way, up to the rate", problem, schedule(lambda run: 0.01 if run.step < run.steps / 2 else 1)
        )
        yield Row("lr / 1000 at two thirds", problem, schedule(lambda run: 1 if run.step < run.steps * 2 / 3 else 1e-3))
        yield Row("lr 0 for 20 steps, 100 of warm-up", problem, schedule(warm_up))
        yield Row("CosineAnnealingWarmRestarts, 4 cycles", problem, Habit(after=restarts))
        yield Row("ReduceLROnPlateau", problem, Habit(after=plateau))
        yield Row("lr finder, model and lr restored", problem, Habit(before=find_lr))
    for factor in (1e-20, 1e-6, 1e6, 1e20):
        yield Row(f"loss times {factor:g}", habit=times(factor))
    yield Row(
        "loss times 1000 from half-way on", habit=Habit(scale=lambda run: 1e3 if 2 * run.step >= run.steps else 1.0)
    )
    quiet = Habit(scale=lambda run: 0.0 if 200 <= run.step < 700 else 1.0, after=watch_coasting)
    yield Row("500 gradients of zero in between", habit=quiet, steps=900)
    yield Row("4 batches added up", habit=Habit(batches=4), steps=300)
    for problem in ("digits", "regression"):
        yield Row("gradients clipped to norm 0.1", problem, Habit(gradients=clip))
    yield Row("first layer frozen for a third", habit=Habit(before=freeze))
    yield Row("bfloat16 model", dtype=torch.bfloat16)
    yield Row("batch of 1, gradients of rank one", "batch of 1", steps=1500)
    yield Row("16 layers of 256", "deep", steps=60)
    yield Row("p.mul_(1 - 1e-4)", habit=each(lambda p: p.mul_(1 - 1e-4)))
    before = Row("labels change after 10,000 steps", "changing labels", steps=CHANGE + 1200)
    yield before
    yield Row("the same, optimizer.reset()", "changing labels", Habit(before=reset), before.steps, peers=before.key)
    yield Row("weight_decay = 0.1", "few noisy examples", steps=1000, options={"weight_decay": 0.1})


ROWS = {row.key: row for row in _rows()}


# ---- trainings ------------------------------------------------------------------------------------------------------


def _adamw(params: list[nn.Parameter], lr: float, weight_decay: float) -> Optimizer:
    return torch.optim.AdamW(params, lr, weight_decay=weight_decay, fused=True)


def _soap(params: list[nn.Parameter], lr: float, weight_decay: float) -> Optimizer:
    from pytorch_optimizer import SOAP  # a large package, only where it is used

    return SOAP(params, lr, weight_decay=weight_decay)


def _auto(params: list[nn.Parameter], lr: float, weight_decay: float) -> Optimizer:
    return lodo.AutoLODO(params, weight_decay=weight_decay)


MAKERS: Mapping[str, tuple[Callable[..., Optimizer], Sequence[float]]] = {
    "AutoLODO": (_auto, (1e-3,)),
    "AdamW": (_adamw, RATES),
    "SOAP": (_soap, RATES),
}


def train(row: Row, optimizer: str, lr: float) -> Result:
    """One training: its loss, whether all numbers were finite, what it raised, and how far untouched entries moved."""
    torch.manual_seed(0)
    problem = PROBLEMS[row.problem]()
    model, generator = problem.model.to(row.dtype), torch.Generator().manual_seed(0)
    held = problem.draw(torch.Generator().manual_seed(1), row.steps, HELD)
    made = MAKERS[optimizer][0](list(model.parameters()), lr=lr, **{"weight_decay": 0.0, **row.options})
    run = Run(model, made, row.steps)
    masks = row.habit.untouched(run)
    starts = [p.detach().clone() for p, _ in masks]

    def loss_on(batch: Batch) -> Tensor:
        x = batch[0].to(row.dtype) if batch[0].is_floating_point() else batch[0]
        return problem.loss(model(x).float(), batch[1])

    losses: list[float] = []
    is_finite, raised = True, None
    try:
        for run.step in range(row.steps):
            with torch.no_grad():
                row.habit.before(run)
            made.zero_grad()
            for _ in range(row.habit.batches):
                loss = loss_on(problem.draw(generator, run.step, problem.batch))
                (loss * row.habit.scale(run)).backward()
            run.loss = float(loss.detach())
            is_finite = is_finite and math.isfinite(run.loss)
            with torch.no_grad():
                row.habit.gradients(run)
                made.step()
                row.habit.after(run)
                if run.step >= row.steps - round(TAIL * row.steps):
                    losses.append(float(loss_on(held)))
    except Exception as error:
        raised = type(error).__name__
    is_finite = is_finite and all(bool(p.isfinite().all()) for p in run.params)
    final = sum(losses) / len(losses) if losses and raised is None else math.nan
    pairs = zip(masks, starts, strict=True)
    moves = [float((p - start)[mask].abs().max() / start.square().mean().sqrt()) for (p, mask), start in pairs]
    return {
        "optimizer": optimizer,
        "lr": lr,
        "loss": final if math.isfinite(final) else None,
        "is_finite": is_finite and math.isfinite(final),
        "raised": raised,
        "moved": max(moves, default=run.moved),
        "skipped_steps": made.skipped_steps if isinstance(made, lodo.LODO) else 0,
    }


def measured(row: Row, known: Mapping[str, Record]) -> Record:
    results = []
    for optimizer, (_, rates) in MAKERS.items():
        if row.peers is not None and row.peers in known and optimizer != "AutoLODO":
            results += [own for own in known[row.peers]["results"] if own["optimizer"] == optimizer]
        else:
            results += [train(row, optimizer, lr) for lr in rates]
    return {"row": row.key, "steps": row.steps, "results": results, "environment": environment()}


# ---- report ---------------------------------------------------------------------------------------------------------


def best(record: Record, optimizer: str) -> Result:
    """The result of the learning rate that ended best."""
    own: list[Result] = [result for result in record["results"] if result["optimizer"] == optimizer]
    return min(
        own, key=lambda result: (not result["is_finite"], math.inf if result["loss"] is None else result["loss"])
    )


def loss_cell(record: Record, optimizer: str) -> str:
    result = best(record, optimizer)
    rate = "" if optimizer == "AutoLODO" else f" ({result['lr']:g})"
    what = result["raised"] or ("not finite" if not result["is_finite"] else f"{result['loss']:.3g}")
    own = [one for one in record["results"] if one["optimizer"] == optimizer]
    bad = sum(not one["is_finite"] for one in own)
    return f"{what}{rate}" + (f", {bad} of {len(own)} failed" if 0 < bad < len(own) else "")


def cells(record: Record) -> tuple[str, ...]:
    auto, adamw = best(record, "AutoLODO"), best(record, "AdamW")
    ratio = auto["loss"] / adamw["loss"] if auto["is_finite"] and adamw["is_finite"] else math.nan
    notes = []
    if not auto["is_finite"] or ratio > WORSE:
        notes.append("**worse**")
    is_untouched = ROWS[record["row"]].habit.untouched is not no_masks
    if is_untouched and auto["moved"] is not None and auto["moved"] > MOVED:
        notes.append("**moved**")
    moves = [best(record, optimizer)["moved"] for optimizer in MAKERS]
    return (
        record["row"],
        f"{record['steps']:,}",
        *(loss_cell(record, optimizer) for optimizer in MAKERS),
        "" if math.isnan(ratio) else f"{ratio:.2f}",
        "" if moves[0] is None else " / ".join("-" if move is None else f"{move:.1g}" for move in moves),
        ", ".join(notes),
    )


def table(records: Sequence[Record]) -> str:
    titles = ("what the user does (problem)", "steps", *MAKERS, "ratio", f"moved: {' / '.join(MAKERS)}", "")
    lines = [titles, (":--", "--:", "--:", "--:", "--:", "--:", "--:", ":--"), *map(cells, records)]
    found = {tuple(own["environment"][name] for name in ("processor", "torch", "lodo_source")) for own in records}
    machines = "; ".join(f"{processor}, one thread, torch {torch}, lodo {source}" for processor, torch, source in found)
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    text = f"""Loss on a held batch, the mean over the last tenth of the steps, at one seed. AutoLODO at its defaults;
AdamW and SOAP at the best of the learning rates {rates} (in brackets; where that is the largest, a larger one
may be better still), without weight decay but in the last row.
`ratio` is AutoLODO's loss over AdamW's; rows where it is above {WORSE}, or AutoLODO fails, are marked **worse**.
`moved` is the largest movement of entries without a gradient, relative to the root mean square of their tensor, and
marked **moved** if above {MOVED:g}; of a frozen layer, and over gradients of zero, it is the norm of the movement
relative to that of the parameters.
{machines}."""
    return "\n".join([text, "", *("| " + " | ".join(line) + " |" for line in lines)])


def put_into_docs(text: str, path: Path = DOCS) -> None:
    """Writes the table between its marks."""
    before, rest = path.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    path.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="NAME,...", help="rows whose names contain one of these")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"(default: {OUT})")
    options = parser.parse_args(arguments)
    chosen = [row for row in ROWS.values() if any(part.strip() in row.key for part in options.only.split(","))]
    if not chosen:
        parser.error(f"--only must name some of {'; '.join(ROWS)}, got {options.only!r}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of skipped steps, which are counted, and of parts that SOAP calls
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "in_use.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    known: dict[str, Record] = {own["row"]: own for own in map(json.loads, lines) if own["row"] in ROWS}
    for row in chosen:
        known.pop(row.key, None)
    for row in chosen:
        known[row.key] = measured(row, known)
        print("| " + " | ".join(cells(known[row.key])) + " |", flush=True)
        records = [known[key] for key in ROWS if key in known]
        path.write_text("".join(json.dumps(own, allow_nan=False) + "\n" for own in records), encoding="utf-8")
    text = table(records)
    (options.out / "in_use.md").write_text(f"# What users do\n\n{text}\n", encoding="utf-8")
    if len(records) == len(ROWS) and options.out == OUT:
        put_into_docs(text)
    print(f"\nIn {options.out}.")


if __name__ == "__main__":
    main()
