"""LODO's bookkeeping again, for one param group, on plain tensors: what the property tests compare an optimizer with.

Only the mathematics is the library's (parts, networks, `lodo.update`, `shorten_`); nothing here knows
`optimizer.state`, checkpoints, views or what is kept between steps. What belongs to a parameter is held for each by
itself, put together for a step and cut again.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lodo.context import Cohort, Context
from lodo.parts import Average, Layout, Momentum, Part, Record, Undone
from lodo.parts.eigenbasis import Eigenbasis
from lodo.parts.mixture import Mixture
from lodo.parts.record import judged_share
from lodo.parts.second_moment import SecondMoment
from lodo.parts.tensor_scale import TensorScale
from lodo.preconditioners import BY_NAME, Composite, Operator, Preconditioner
from lodo.rounding import random_words, to_bfloat16
from lodo.step import shorten_
from lodo.update import update_for

Gradients = Sequence[Tensor | None]
Number = Callable[[Any], Any]

MOMENTS = ("theta_exp_avg", "theta_exp_avg_sq")
SHAPED = {"momentum", "momentum_trace", "exp_avg_sq", "seen", "step_trace", "momenta", "written", "theta", *MOMENTS}
SHAPED |= {"average"}
INTEGERS = {"step", "skipped_steps", "meta_step", "network_step", "reset_at", "averaged"}
PACKED = {"factors", "eigenbasis"}
NUMBERS = {*INTEGERS, "last_lr", "scheduled_lr"} - {"averaged"}  # what no part computes with
# Of float64 whatever the parameters are:
WIDE = {"scale", "scale_peak", "trace_peak", "progress", "mixture", "recent_energy", "unit", "scheduled_lr", "last_lr"}
# The powers of gradients that there are of, and those of the rows of tables.
POWERS = {"momentum": 1, "momentum_trace": 1, "momenta": 1, "exp_avg_sq": 2, "factors": 2, "recent_energy": 2}
POWERS |= {"theta_exp_avg": 1, "theta_exp_avg_sq": 2}
ROWS = {"scale": (0, 1, 2), "mixture": (0, 2, 4)}


class Replay:
    """One param group.

    Attributes:
        values: what the parameters must be.
        options: of the group, complete, lr a plain float.
        own: what must be kept for each parameter, by the names it has in the optimizer's state; nothing before there is
            any.
        shared: what must be kept of a network that acts on the whole group.
    """

    def __init__(
        self, values: Sequence[Tensor], options: dict[str, Any], learned: Preconditioner | None = None
    ) -> None:
        self.values = [value.detach().clone(memory_format=torch.contiguous_format) for value in values]
        self.options = dict(options)
        self.own: list[dict[str, Tensor]] = [{} for _ in values]
        self.shared: dict[str, Tensor] = {}
        if learned is not None:
            self.prepare(learned)

    @property
    def kind(self) -> type[Preconditioner]:
        return BY_NAME[self.options["preconditioner"]]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if any(value.dtype == torch.float64 for value in self.values) else torch.float32

    @property
    def lengths(self) -> list[int]:
        return [value.numel() for value in self.values]

    @property
    def layout(self) -> Layout:
        shapes, dtypes = [value.shape for value in self.values], [value.dtype for value in self.values]
        return Layout(shapes, dtypes, self.dtype, torch.device("cpu"))

    @property
    def has_state(self) -> bool:
        return any(self.own)

    @property
    def uses_moments(self) -> bool:
        return self.kind.learns and self.options["meta_lr"] > 0 and self.options["meta_optimizer"] == "adam"

    @property
    def skipped(self) -> int:
        return max((int(own["skipped_steps"]) for own in self.own if own), default=0)

    def copy(self) -> "Replay":
        return copy.deepcopy(self)

    # ---- what is kept ------------------------------------------------------------------------------------------------

    def parts(self) -> list[type[Part]]:
        options, found = self.options, {name for own in self.own for name in own}
        base: list[type[Part]] = {None: [], "adam": [SecondMoment], "soap": [Eigenbasis]}[options["base"]]
        scale: list[type[Part]] = [TensorScale] if options["scale_lr"] > 0 or "scale" in found else []
        momentum: type[Part] = Momentum if options["momentum_decays"] is None else Mixture
        record: list[type[Part]] = [Record] if base or scale or momentum is Mixture else []
        average: list[type[Part]] = [Average] if options["average_share"] is not None or "average" in found else []
        return [*base, *scale, momentum, *average, *record]

    def names(self) -> list[str]:
        """Of what there is for each parameter."""
        found, parts = {name for own in self.own for name in own}, self.parts()
        names = ["step", "skipped_steps", "momentum"]
        if self.options["trace_decay"] > 0 or "momentum_trace" in found:
            names.append("momentum_trace")
        names += ["exp_avg_sq", "unit"] if self.options["base"] is not None else []
        names += ["factors", "eigenbasis", "seen"] if Eigenbasis in parts else []
        names += ["scale", "scale_peak", "trace_peak", "progress", "step_trace"] if TensorScale in parts else []
        names += ["momenta", "mixture", "recent_energy"] if Mixture in parts else []
        names += ["average", "averaged"] if Average in parts else []
        names += ["written", "scheduled_lr", "reset_at"] if Record in parts else []
        return names + (self.names_of_network() if self.kind.is_elementwise else [])

    def names_of_network(self) -> list[str]:
        """Of what it keeps, but for its indices."""
        found = {name for kept in (self.shared, *self.own) for name in kept}
        moments = MOMENTS if self.uses_moments or "theta_exp_avg" in found else ()
        own = [] if self.kind.is_elementwise else ["network_step"]
        return [*own, "theta", *moments, "meta_step", "last_lr"] if self.kind.learns else ["last_lr"]

    def dtype_of(self, name: str) -> torch.dtype:
        if name in ("momentum", *MOMENTS):
            option = "momentum_dtype" if name == "momentum" else "meta_state_dtype"
            return torch.bfloat16 if self.options[option] == "bfloat16" else self.dtype
        kinds = {
            "seen": torch.uint8,
            **dict.fromkeys(WIDE, torch.float64),
            **dict.fromkeys(INTEGERS, torch.int64),
        }
        return kinds.get(name, self.dtype)

    def shape_of(self, name: str, place: int) -> tuple[int, ...]:
        decays = self.options["momentum_decays"] or ()
        if name in SHAPED:
            return (*((len(decays),) if name == "momenta" else ()), *self.values[place].shape)
        if name in PACKED:
            (slot,) = (slot for slot in Eigenbasis.slots(self.options) if slot.name == name)
            return (self.layout.room(slot)[place],)
        tables: dict[str, tuple[int, ...]] = {"scale": (3,), "mixture": (3, len(decays))}
        return tables.get(name, ())

    def prepare(self, learned: Preconditioner | None = None) -> None:
        """Brings what is kept into the dtypes that parameters and options ask for; starts what is not there."""
        missing: dict[str, list[int]] = {name: [] for name in self.names()}
        for place, own in enumerate(self.own):
            for name, places in missing.items():
                if name in own:
                    own[name] = own[name].to(self.dtype_of(name))
                else:
                    own[name] = torch.zeros(self.shape_of(name, place), dtype=self.dtype_of(name))
                    places.append(place)
        unit = max(float(own.get("unit", 0.0)) for own in self.own)
        for own in self.own:
            own.get("unit", torch.zeros(())).fill_(unit)
        tensors = self.together()
        for part in self.parts():
            part(self.layout, tensors, self.options).start_(missing, self.values)
        self.cut(tensors)
        if not self.kind.is_elementwise:
            self.prepare_network(learned)
        elif learned is not None and self.kind.learns:
            self.cut({"theta": learned.theta.to(self.dtype)})

    def prepare_network(self, learned: Preconditioner | None) -> None:
        if not self.shared:
            place = (self.dtype, torch.device("cpu"))
            size = sum(self.lengths)
            network = self.kind.start(size, self.options, *place) if learned is None else learned.to(*place)
            self.shared["theta"] = network.theta
            if network.permutations_stored is not None:
                self.shared["permutations"] = network.permutations_stored
        for name in self.names_of_network():
            shape = self.shared["theta"].shape if name in MOMENTS else ()
            self.shared[name] = self.shared.get(name, torch.zeros(shape)).to(self.dtype_of(name))

    def forget(self, place: int) -> None:
        """As if the parameter there were new. The first one has what there is for the whole group."""
        self.own[place] = {}
        if place == 0:
            self.shared = {}

    def reset(self) -> None:
        """Lets begin anew what learns ever more slowly, and averages of the iterates."""
        for own in self.own:
            if "averaged" in own:
                own["averaged"].zero_()
        if Record not in self.parts():
            return
        for own in self.own:
            own["reset_at"].copy_(own["step"])
        capped = ("theta", *MOMENTS, "meta_step") if self.kind.rate_cap is not None else ()
        for own in self.own:
            for name in own.keys() & {
                "scale",
                "scale_peak",
                "trace_peak",
                "progress",
                "step_trace",
                "mixture",
                *capped,
            }:
                own[name].zero_()
        tensors = self.together()
        for part in self.parts():
            if part is Mixture:
                missing = {"mixture": range(len(self.own)), "momentum_trace": []}
                part(self.layout, tensors, self.options).start_(missing, self.values)
        self.cut(tensors)

    def averages(self) -> list[Tensor]:
        """Where parameters are to be shown."""
        share, found = self.options["average_share"], []
        for own, value in zip(self.own, self.values, strict=True):
            count = int(own["averaged"]) if share is not None and "averaged" in own else 0
            if count > 0:
                weight = torch.full_like(own["average"], 1 / (1 + share * count))
                value = torch.lerp(own["average"], value.to(self.dtype), weight).to(value.dtype)
            found.append(value)
        return found

    # ---- together and apart ------------------------------------------------------------------------------------------

    def together(self) -> dict[str, Tensor]:
        """What parts and networks compute with, each for all parameters."""
        found = {}
        for name in (name for name in self.names() if name not in NUMBERS):
            each = [own[name] for own in self.own]
            if name in SHAPED:
                lead = each[0].shape[: each[0].dim() - self.values[0].dim()]
                each = [tensor.reshape(*lead, length) for tensor, length in zip(each, self.lengths, strict=True)]
                found[name] = torch.cat(each, -1)
            else:
                found[name] = torch.cat(each) if name in PACKED else torch.stack(each)
        return found

    def cut(self, tensors: dict[str, Tensor]) -> None:
        """Takes them apart again."""
        for name, tensor in tensors.items():
            if name in SHAPED:
                each = list(tensor.split(self.lengths, -1))
            elif name in PACKED:
                each = list(tensor.split([own[name].numel() for own in self.own]))
            else:
                each = list(tensor)
            for place, (own, part) in enumerate(zip(self.own, each, strict=True)):
                own[name] = part.reshape(self.shape_of(name, place)).clone()

    def flat(self, tensors: Gradients) -> Tensor:
        parts = zip(tensors, self.values, strict=True)
        return torch.cat([(torch.zeros_like(v) if t is None else t).reshape(-1).to(self.dtype) for t, v in parts])

    def pieces(self, vector: Tensor) -> list[Tensor]:
        return [part.view(v.shape) for part, v in zip(vector.split(self.lengths), self.values, strict=True)]

    def operators(self, tensors: dict[str, Tensor], parts: Sequence[Part]) -> tuple[Preconditioner, Operator]:
        """The network, and G / lr."""
        theta = (tensors if self.kind.is_elementwise else self.shared).get("theta", torch.empty(0, dtype=self.dtype))
        network = self.kind.wrap(theta, self.shared.get("permutations"), sum(self.lengths))
        factors = [part for part in parts if part.is_factor]
        return network, Composite(network, factors) if factors else network

    def described(self) -> str:
        """What G / lr shows itself as."""
        tensors = self.together()
        return repr(self.operators(tensors, [part(self.layout, tensors, self.options) for part in self.parts()])[1])

    # ---- a step ------------------------------------------------------------------------------------------------------

    def counted(self, name: str) -> list[Any]:
        """A count of each parameter, or that of the network that all share."""
        return [(self.shared if name in self.shared else own)[name].item() for own in self.own]

    def learns(self, takes: Sequence[bool]) -> list[bool]:
        """Whether a network is learned for each parameter: at every so many of its steps, or of those of all."""
        counts = self.counted("step" if self.kind.is_elementwise else "network_step")
        every = self.options["meta_every"]
        return [takes_it and count % every == 0 for takes_it, count in zip(takes, counts, strict=True)]

    def context(self, takes: Sequence[bool], number: Number) -> Context:
        """What is known of a step that these parameters take; `number` makes scalars what the optimizer has them as."""
        options, has_record = self.options, "reset_at" in self.own[0]
        steps, last_lrs = self.counted("step"), self.counted("last_lr")
        inner_steps = self.counted("meta_step") if self.kind.learns else [0] * len(steps)
        scheduled = self.counted("scheduled_lr") if has_record else [0.0] * len(steps)
        ages = [a - b for a, b in zip(steps, self.counted("reset_at"), strict=True)] if has_record else inner_steps
        learns = self.learns(takes)
        lr = number(float(options["lr"]))
        alike: dict[Any, list[int]] = {}
        for place, key in enumerate(zip(takes, learns, steps, inner_steps, last_lrs, scheduled, ages, strict=True)):
            alike.setdefault(key, []).append(place)
        cohorts = []
        for (takes_it, learns_it, t, inner_t, last_lr, former_lr, age), places in alike.items():
            if options["base"] is None or options["momentum_decays"] is not None:  # a mixture corrects each momentum
                own_lr = lr
            else:
                count = t if self.kind.is_elementwise else max(steps)
                own_lr = lr / (1 - options["beta"] ** number(float(max(count, 1))))
            cohorts.append(
                Cohort(
                    tuple(places),
                    computable(True, number) if takes_it else False,
                    computable(learns_it, number) if takes_it else False,
                    number(float(t)),
                    number(float(age)),
                    number(float(inner_t)),
                    number(last_lr),
                    own_lr,
                    number(former_lr),
                )
            )
        active, learning = (number(True), number(any(learns))) if any(takes) else (False, False)
        return Context(options, self.lengths, cohorts, active, learning, lr, number(last_lrs[0]))

    def step(self, gradients: Gradients, number: Number) -> None:
        """A step on sound gradients."""
        options, lr = self.options, float(self.options["lr"])
        gradient = -self.flat(gradients) if options["maximize"] else self.flat(gradients)
        if float(gradient.dot(gradient)) + lr == 0:
            return  # idle
        tensors = self.together()
        parts = [part(self.layout, tensors, options) for part in self.parts()]
        (momentum,) = (part for part in parts if isinstance(part, Momentum))
        network, operator = self.operators(tensors, parts)
        kept = tensors if self.kind.is_elementwise else self.shared
        moments = (kept[MOMENTS[0]], kept[MOMENTS[1]]) if self.uses_moments else None
        update = update_for(operator, network, moments, momentum, parts, self.lengths)
        unit = float(tensors["unit"][0]) or 1.0 if "unit" in tensors else 1.0
        update.refresh_(self.context([False] * len(self.own), number)._replace(unit=number(unit)))
        if "written" in tensors:
            sizes = update.energies(gradient)
            energy = torch.stack(list(sizes)).sum() if isinstance(number(0.0), Tensor) else sum(sizes)
            for part in parts:
                energy = part.normalize(energy)

        given = [g is not None for g in gradients]
        takes = given
        if not self.kind.is_elementwise:  # a gradient that is missing counts as zero, once there has been one
            takes = [has or t > 0 for has, t in zip(given, self.counted("step"), strict=True)]
        for own, takes_it in zip(self.own, takes, strict=True):
            own["step"] += takes_it
        if self.shared:
            self.shared["network_step"] += 1
        if options["meta_lr"] > 0 and self.kind.learns:
            learns = self.learns(takes)
            for own, learns_it in zip(self.own, learns, strict=True) if self.kind.is_elementwise else ():
                own["meta_step"] += learns_it
            if self.shared:
                self.shared["meta_step"] += any(learns)
        at = self.context(takes, number)._replace(unit=number(unit))
        if Mixture in self.parts() and any(g is not None and not g.any() for g in gradients):
            at = at._replace(idle=[number(g is not None and not bool(g.any())) for g in gradients])

        share = None
        if "written" in tensors:
            undone = self.look_back(operator, momentum, tensors, at, takes, number)
            last = self.last_step(operator, momentum, at)
            for part in parts:
                part.correct_(gradient, undone, at)
            share = None if undone is None else judged_share(undone)
        at = at._replace(share=share)
        for part in parts:
            factor = part.change_unit_(gradient, number(True))
            if factor != 1:
                self.rescale_(tensors, factor)
                momentum.load_()
        if "unit" in tensors:
            at = at._replace(unit=number(float(tensors["unit"][0]) or 1.0))

        for part in parts:
            if isinstance(part, Average):
                part.take_in_(self.flat(self.values), at)
        update.begin_(at)
        if "written" in tensors:
            pulled = gradient
            if options["weight_decay"]:
                sizes = [1.0] * len(self.values)
                if options["base"] is not None:
                    sizes = [float(size) for size in parts[0].gradient_scales(at) or ()]
                pull = [value.to(self.dtype) * size for value, size in zip(self.values, sizes, strict=True)]
                pulled = gradient.add(self.flat(pull), alpha=options["weight_decay"])
            update.learn_parts_(pulled, at)
        rotated = operator.rotate(gradient if share is None else gradient * share)
        update.learn_(rotated, at)
        if update.learns_from_step and options["weight_decay"]:
            update.learn_from_step_(pulled if share is None else pulled * share, last, at)
        current: Tensor | None = rotated if share is None else None
        for part in parts:
            current = part.update_basis_(gradient, current, momentum.in_coordinates, at)
        step = update.advance_(operator.rotate(gradient) if current is None else current, at)
        step = operator.rotate_back_(step.clone())
        if options["momentum_dtype"] == "bfloat16":
            count = max(t for t, takes_it in zip(self.counted("step"), takes, strict=True) if takes_it)
            words = random_words(0, sum(self.lengths), -count, gradient.device)
            tensors["momentum"] = to_bfloat16(momentum.m, words)

        self.subtract(step, parts, tensors, at, given, takes)
        self.cut(tensors)

    def subtract(
        self,
        step: Tensor,
        parts: Sequence[Part],
        tensors: dict[str, Tensor],
        at: Context,
        given: Sequence[bool],
        takes: Sequence[bool],
    ) -> None:
        """Moves the parameters that have a gradient, of those that take the step."""
        options = self.options
        moved = self.flat([torch.ones_like(v) if has else None for v, has in zip(self.values, given, strict=True)]) > 0
        factor, is_finite = 1.0, True
        if options["max_step_norm"] is not None or "written" in tensors:
            step.masked_fill_(~moved, 0)
        if options["max_step_norm"] is not None:
            x = self.flat([v if has else None for v, has in zip(self.values, given, strict=True)])
            shortened, finite = shorten_(step, x, options["max_step_norm"])
            factor, is_finite = float(shortened), bool(finite)
            for own in self.own:
                own["skipped_steps"] += not is_finite
        for cohort in at.cohorts:
            if not (isinstance(cohort.active, Tensor) or cohort.active):
                continue
            for own in [self.own[place] for place in cohort.places] if self.kind.is_elementwise else [self.shared]:
                own["last_lr"].fill_(float(cohort.lr) * factor)
            for place in cohort.places if "written" in tensors else ():
                self.own[place]["scheduled_lr"].fill_(float(options["lr"]))
        if options["weight_decay"] and is_finite:
            decay = self.decay(parts, [float(options["lr"])] * len(self.values))
            step += decay * moved if "written" in tensors else decay
        for part in parts:
            part.record_(step, at)
        for value, has, part in zip(self.values, given, self.pieces(step), strict=True):
            if has:
                value.copy_(value.to(self.dtype) - part)
        if "written" in tensors:
            took = self.flat([torch.full_like(value, t) for value, t in zip(self.values, takes, strict=True)]) > 0
            tensors["written"] = torch.where(took, self.flat(self.values), tensors["written"])

    def decay(self, parts: Sequence[Part], lrs: Sequence[float]) -> Tensor:
        """What weight decay subtracts."""
        rates = [lr * self.options["weight_decay"] for lr in lrs]
        scales = [part.factors() for part in parts if isinstance(part, TensorScale)]
        if scales:
            rates = (scales[0] * torch.tensor(rates, dtype=torch.float64)).clamp(max=1).tolist()
        return self.flat([value.to(self.dtype) * rate for value, rate in zip(self.values, rates, strict=True)])

    def look_back(
        self,
        operator: Operator,
        momentum: Momentum,
        tensors: dict[str, Tensor],
        at: Context,
        takes: Sequence[bool],
        number: Number,
    ) -> Undone | None:
        """What somebody has done to the parameters since their last steps."""
        steps = self.counted("step")
        x, is_readable = self.flat(self.values), not isinstance(number(0.0), Tensor)
        if is_readable and (max(steps) <= 1 or torch.equal(x, tensors["written"])):
            return None
        has_last = [takes_it and t > 1 for takes_it, t in zip(takes, steps, strict=True)]
        looks = self.flat([torch.full_like(v, has) for v, has in zip(self.values, has_last, strict=True)]) > 0
        change = torch.where(looks, (x - tensors["written"]).nan_to_num(0.0, 0.0, 0.0), 0.0)
        step = self.last_step(operator, momentum, at)
        rounding = x.abs() * (2 * max(torch.finfo(value.dtype).eps for value in self.values))
        return Undone(change, step, rounding)

    def last_step(self, operator: Operator, momentum: Momentum, at: Context) -> Tensor:
        """What the last step has subtracted."""
        last_lrs = [lr * float(at.unit) for lr in self.counted("last_lr")]
        made = [part * lr for part, lr in zip(self.pieces(operator.apply(momentum.m)), last_lrs, strict=True)]
        step = operator.rotate_back_(self.flat(made).clone())
        if self.options["weight_decay"]:
            parts = operator.parts if isinstance(operator, Composite) else ()
            step = step + self.decay(parts, self.counted("scheduled_lr"))
        return step

    def rescale_(self, tensors: dict[str, Tensor], factor: float) -> None:
        """Another unit for what is kept of gradients, by the power of them that it is."""
        for name, tensor in [*tensors.items(), *self.shared.items()]:
            if name in POWERS:
                tensor.mul_(factor ** POWERS[name])
            for row, power in enumerate(ROWS.get(name, ())):
                tensor[:, row] *= factor**power


def computable(flag: bool, number: Number) -> Any:
    """A flag as cohorts have it."""
    return number(float(flag)) if isinstance(number(0.0), Tensor) else flag


def step_all(groups: Sequence[Replay], gradients: Sequence[Gradients], number: Number) -> bool:
    """One call of `step` on all groups; returns whether it was left out because of a bad gradient."""
    given = list(zip(groups, gradients, strict=True))
    moving = [(group, own) for group, own in given if any(g is not None and g.numel() for g in own)]
    is_bad = not all(g.isfinite().all() for _, own in moving for g in own if g is not None)
    for group, own in moving:
        group.prepare()
        if is_bad:
            for kept in group.own:
                kept["skipped_steps"] += 1
        else:
            group.step(own, number)
    return is_bad
