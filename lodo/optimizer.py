"""The optimizers `lodo.LODO` and `lodo.AutoLODO`: arguments, param groups, closure, the call of a step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from lodo import diagnostics, state
from lodo.composite import Composite
from lodo.flat import Place, check_parameters, has_gradients
from lodo.notices import BROKEN_OFF, LOST_NETWORK, NEW_NETWORKS, NOT_WORTH_KEEPING, SKIPPED, warn
from lodo.options import ADDED, CHANGEABLE, FLOATS, RECOMMENDED, check_lr, check_options, refuse_others
from lodo.preconditioners import Operator, Preconditioner
from lodo.rounding import kept_dtype, name_of
from lodo.saved import made_ready, unwrap
from lodo.scalars import Number, choose, is_tensor
from lodo.scale import kept_share, taken_back
from lodo.step import judge, lodo_step, shorten_


class LODO(Optimizer):
    r"""Quasi-Newton optimization with an inverse Hessian that is learned while it is used.

    .. math::
        \theta &\leftarrow \mathrm{Adam}(\theta, -\nabla_\theta \langle g, G(\theta) m \rangle) \\
        m &\leftarrow \beta m + (1 - \beta) g \\
        x &\leftarrow x - G(\theta) m, \qquad G(\theta) = \mathrm{lr} \cdot U(\theta)^T U(\theta)

    (Liao, Dangovski, Foerster, Soljacic: "Learning to Optimize Quasi-Newton Methods", TMLR 2023, Algorithm 1.) One G
    acts on each param group, flattened in order: one group is the paper's setting, several make G block-diagonal.
    The defaults are the paper's; `lodo.AutoLODO(params)` is the call that wants no tuning.

    Args:
        params: tensors, (name, tensor) pairs or dicts of param groups; float16, bfloat16, float32 or float64.
        lr: scale of G at the start (the paper's alpha_0), a number >= 0 or a one-element tensor.
        meta_lr: learning rate of the inner optimizer (alpha); 0 freezes G. At step t of "log_diagonal" at most 30 / t.
        beta: decay of the momentum, an exponential moving average, in [0, 1).
        weight_decay: decoupled, x <- (1 - lr * S * weight_decay) x with the scale S of each tensor, if there are any
            (`scale_lr`): in proportion to the steps that are taken, as AdamW's is. The scales' hypergradient knows of
            it, all others do not.
        preconditioner: "block_permutation", "residual", "diagonal", "scalar", beyond the paper "log_diagonal" and
            "identity" (no network), or a learned preconditioner, of which the group starts with a copy.
        depth: number of layers; None is 16 for "block_permutation", 64 for "residual".
        block_size: k, side of the blocks ("block_permutation").
        expansion: n~ / n >= 1, before n~ is rounded up to a multiple of k ("block_permutation", "residual").
        permutation: "random", or "shuffle" for the perfect shuffle, which moves no data ("block_permutation").
        meta_optimizer: "adam" or "sgd".
        meta_every: K >= 1: G is learned at every K-th step only, and applied at every step.
        meta_state_dtype: of the inner Adam's moments: None for the network's own, or "bfloat16" (torch.bfloat16
            is taken too), with stochastic rounding: half the memory of the moments.
        momentum_dtype: the same for the momentum.
        trace: decay, in [0, 1), of the momenta that the hypergradient judges: their trace e <- trace * e + m, in place
            of the last one alone. 0 is the paper.
        base: None, or what G is before anything is learned: "adam" for 1 / (sqrt(v) + 1e-8), "soap" for the same in the
            eigenbasis of each matrix's gradients (waits on CUDA). lr and the momentum's correction are then Adam's.
        scale_lr: learning rate of a logarithmic scale per tensor, as part of G; 0: there is none. See `lodo.scale`.
        scale_trace: decay, in [0, 1), of the steps that the scales' hypergradient judges.
        decays: None, or several, each in [0, 1), of momenta whose weights are learned for each tensor: their mixture
            takes the place of the single momentum, and starts near that of decay `beta`. See `lodo.mixture`.
        mix_lr: learning rate of these weights.
        max_step_norm: the longest step, relative to the parameters: a step longer than max_step_norm * |x| over its
            param group (or than if x had a root mean square of 1e-3) is shortened to that. To the hypergradient it is a
            step of a smaller lr. Weight decay comes on top.
        max_condition: K >= 1, the largest condition number of G: every inner step is followed by the projection of the
            blocks to singular values in [1 / r, r], r = K ** (1 / (4 * depth)), so that the eigenvalues of G / lr stay
            in [K ** -0.5, K ** 0.5]. Not for "residual". On CUDA it makes the host wait.
        maximize: ascend instead of descend.
        capturable: allow `step` to be captured in a CUDA graph, after at least one step outside; see `step`.
        seed: of the initial network; gives the same numbers on every device.
        others: arguments of other optimizers that ask for nothing, as factories pass them to all: `foreach`, `fused`,
            `differentiable` and `amsgrad` that are None or False.

    Raises:
        TypeError: for arguments that LODO does not have.
        ValueError: for arguments out of range, naming argument, value and what is allowed; for sparse, complex or
            integer parameters; for a param group on two devices.
        RuntimeError: in `step`, for sparse gradients, before anything has changed.

    Parameters without a gradient are not written and count as zero gradient. A step whose gradient holds a NaN or an
    infinity changes nothing; see `skipped_steps`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        meta_lr: float = 1e-3,
        beta: float = 0.9,
        weight_decay: float = 0.0,
        *,
        preconditioner: str | Preconditioner = "block_permutation",
        depth: int | None = None,
        block_size: int = 4,
        expansion: float = 2,
        permutation: str = "random",
        meta_optimizer: str = "adam",
        trace: float = 0.0,
        base: str | None = None,
        scale_lr: float = 0.0,
        scale_trace: float = 0.998,
        decays: Sequence[float] | None = None,
        mix_lr: float = 0.01,
        meta_every: int = 1,
        meta_state_dtype: str | torch.dtype | None = None,
        momentum_dtype: str | torch.dtype | None = None,
        max_step_norm: float | None = None,
        max_condition: float | None = None,
        maximize: bool = False,
        capturable: bool = False,
        seed: int = 0,
        **others: Any,
    ) -> None:
        refuse_others(type(self).__name__, others)
        defaults = {
            "lr": lr,
            "meta_lr": meta_lr,
            "beta": beta,
            "weight_decay": weight_decay,
            "preconditioner": preconditioner,
            "depth": depth,
            "block_size": block_size,
            "expansion": expansion,
            "permutation": permutation,
            "meta_optimizer": meta_optimizer,
            "trace": trace,
            "base": base,
            "scale_lr": scale_lr,
            "scale_trace": scale_trace,
            "decays": decays,
            "mix_lr": mix_lr,
            "meta_every": meta_every,
            "meta_state_dtype": name_of(meta_state_dtype),
            "momentum_dtype": name_of(momentum_dtype),
            "max_step_norm": max_step_norm,
            "max_condition": max_condition,
            "maximize": maximize,
            "capturable": capturable,
            "seed": seed,
        }
        check_options(defaults)
        self._live: dict[Tensor, state.GroupState] = {}
        self._checked: dict[Tensor, tuple[Any, ...]] = {}
        self._next_warning = 1  # so many skipped steps
        self._is_broken_off = False
        self._has_momentum_alone = False  # in the state dict that was loaded last
        super().__init__(params, defaults)
        if isinstance(preconditioner, Preconditioner):
            # Options stay plain numbers and strings; a group added later starts with the same architecture.
            self.defaults.update(preconditioner.options)

    def reset(self, group: int | None = None) -> None:
        """Lets learning begin anew where the data have changed, and keeps what is known.

        Scales, gains and the weights of the momenta, which learn ever more slowly in a long training, go back to their
        start and learn at least as fast as there; averages last as long and eigenbases are renewed as often. What
        is known of the gradients stays: momenta, second moments, eigenbases. So do the counts of steps. The paper's
        method learns at a constant rate, and is left as it is.

        Args:
            group: index of a param group; None for all.

        Raises:
            ValueError: if there is no such group.
        """
        is_index = isinstance(group, int) and not isinstance(group, bool)
        if group is not None and not (is_index and 0 <= group < len(self.param_groups)):
            raise ValueError(f"group must be None or 0 to {len(self.param_groups) - 1}, got {group!r}")
        for each in self.param_groups if group is None else [self.param_groups[group]]:
            if self._has_state(each):
                live = self._group_state(each)
                live.reset_(each)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, during training too, with its own network. Its options default to the constructor's.

        Raises:
            TypeError, ValueError: as the constructor; the optimizer is as before then.
        """
        learned = None
        if isinstance(param_group, dict):
            param_group = {name: name_of(value) for name, value in param_group.items()}
            options = {**self.defaults, **param_group}
            check_options(options)
            if isinstance(options["preconditioner"], Preconditioner):
                learned = options["preconditioner"]
                param_group = {**param_group, **learned.options}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["params"] = list(dict.fromkeys(group["params"]))  # torch only warns of one that is given twice
        for name in FLOATS:
            if not isinstance(group[name], Tensor | int | None):
                group[name] = float(group[name])  # NumPy's numbers would not pass torch.load(weights_only=True)
        if group["decays"] is not None:
            group["decays"] = tuple(map(float, group["decays"]))
        try:
            check_parameters(group["params"])
            state.check_base(group)
            if learned is not None:
                self._keep(group, state.start(group, learned))
        except Exception:
            self.param_groups.pop()
            raise

    @property
    def preconditioners(self) -> list[Operator | None]:
        """The learned preconditioner of each param group, None before the group's first step: a
        `lodo.composite.Composite` where there is a base or a scale beside the network.

        They are the optimizer's own and go on learning; `copy.deepcopy` one to keep it as it is.
        """
        return [self._group_state(group).operator if self._has_state(group) else None for group in self.param_groups]

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out because of gradients with NaN or infinity, or by `max_step_norm` because they
        overflowed (the largest count over the groups).

        Reading it waits for the device.
        """
        entries = [state.entry_of(group, self.state) for group in self.param_groups if self._has_state(group)]
        return max((int(entry["skipped"]) for entry in entries), default=0)

    @torch.no_grad()
    def diagnostics(self, *, probes: int = 2, iterations: int = 8) -> list[dict[str, float]]:
        """Figures about the last step and about G, plain numbers for a log: a dict for each param group, empty before
        there is any state for it, and on ranks that have nothing of it.

        Asking costs some ten steps' time and, for a moment, as much memory as theta and its moments; not asking costs
        nothing. On accelerators it waits for the device. Training goes on as if nobody had asked.

        - "steps" taken, "skipped_steps", "lr".
        - "step_norm": |G m| of the last step; "relative_step_norm": the same over the norm of the parameters. Of those
          with a gradient, if there are any.
        - "gradient_norm": of what is in `.grad`. After `backward` and before `step` that is the gradient where the last
          step landed, by which LODO judges that step; after `step` it is the one where the step began.
        - "step_gradient_cosine": between the last step, as it is subtracted, and that gradient: its agreement with the
          direction of steepest descent. NaN where one is zero.
        - "hypergradient_norm": of -d/dtheta <g, G m>, that gradient being g, the next inner step's if asked before
          `step`. Not for frozen groups.
        - "eigenvalue_min", "eigenvalue_max", "trace" of G: estimated from `probes` times `iterations` products with G,
          see `lodo.spectrum`. The two lie inside the spectrum.
        - "singular_value_min", "singular_value_max" of all blocks ("block_permutation" only).
        - "scale_min", "scale_max" over the tensors, if they have scales.
        - "seconds_gather", "seconds_learn", "seconds_apply": the parts of a step, as measured during this call.

        On several ranks the figures of sharded groups are of this rank's shard.
        """
        return [
            diagnostics.figures(group, self._group_state(group), probes, iterations) if self._has_state(group) else {}
            for group in self.param_groups
        ]

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    # A compiled training step runs this one eagerly. The public torch.compiler.disable does the same, but would make
    # `import lodo` load the compiler.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step on the gradients in `.grad`; see `lodo.step.lodo_step`.

        In a CUDA graph (`capturable=True`) an lr that is to change between replays must be a tensor on the device; the
        other options are fixed when the graph is captured. Skipped steps are counted there, without a warning. After
        loading a state, and after a change of an option that state depends on, capture anew.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: for sparse gradients, parameters without data, state of other groups, or a capture that is not
                allowed; nothing has changed then. Also after a step that was broken off in the middle, until a state is
                loaded: an exception such as torch.OutOfMemoryError that comes while parameters and state change has a
                note that says so.
        """
        must_wait = self._is_broken_off and not self._is_reloaded()
        if must_wait and any(group["lr"] != 0 for group in self.param_groups):
            raise RuntimeError(BROKEN_OFF)
        is_captured = self._is_captured()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [group for group in self.param_groups if has_gradients(group["params"])]
        for group in groups:
            self._check_changes(group)
        states = [self._group_state(group) for group in groups]
        for group, live in zip(groups, states, strict=True):
            live.flat.gather(live.flat.gradients(group["params"]), live.gradient_parts)
            if group["maximize"]:
                live.gradient.neg_()
            live.lr.set(group["lr"])
        verdicts = _judge_all(groups, states)
        if must_wait:
            return loss  # lr = 0: distributed checkpointing makes the state that it will load into
        # Up to here nothing has changed. A capture only records, so that one which fails changes nothing either.
        self._is_broken_off = not is_captured
        try:
            for group, live, (sound, idle) in zip(groups, states, verdicts, strict=True):
                if is_tensor(sound) or not sound:
                    live.skipped.set(live.skipped.get() + (sound == 0))
                active = sound > idle
                if is_tensor(active) or active:
                    self._step_group(group, live, active)
        except BaseException as error:
            if self._is_broken_off:
                error.add_note(BROKEN_OFF)
            raise
        self._is_broken_off = False
        for group, live, (sound, _) in zip(groups, states, verdicts, strict=True):
            if not is_captured and (is_tensor(sound) or not sound or group["max_step_norm"] is not None):
                self._notice_skips(live)
        return loss

    def _is_reloaded(self) -> bool:
        """Whether all state was exchanged since the last step, as ZeroRedundancyOptimizer does past
        `load_state_dict`."""
        known = [(group, self._live.get(group["params"][0])) for group in self.param_groups if group["params"]]
        lives = [(group, live) for group, live in known if live is not None]
        return bool(lives) and all(live.is_replaced(self.state, group) for group, live in lives)

    def _check_changes(self, group: dict[str, Any]) -> None:
        """Refuses options that were written into a param group since the last step, if they are out of range."""
        check_lr(group["lr"])  # each time, for schedulers write it
        options = tuple(group[name] for name in CHANGEABLE)
        if self._checked.get(group["params"][0]) != options:
            check_options(group)
            self._checked[group["params"][0]] = options

    def _is_captured(self) -> bool:
        """Whether this call is being captured in a CUDA graph.

        Raises:
            RuntimeError: if it is and a group does not allow it, or has no state yet.
        """
        if not torch.cuda.is_initialized() or not torch.cuda.is_current_stream_capturing():
            return False
        if not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError("capturable must be True in every param group for LODO.step to be captured, got False")
        if not all(self._is_live(group) for group in self.param_groups if has_gradients(group["params"])):
            raise RuntimeError(
                "LODO prepares its state at the first step and at the first one after a load, which cannot be captured "
                "in a CUDA graph; take at least one step before the capture"
            )
        return True

    def _notice_skips(self, live: state.GroupState) -> None:
        """Warns when the host learns of the first skipped step, of the tenth, the hundredth, ..."""
        skips = live.new_skips()
        if skips >= self._next_warning:
            while skips >= self._next_warning:
                self._next_warning *= 10
            warn(SKIPPED.format(count=skips))

    def _step_group(self, group: dict[str, Any], live: state.GroupState, active: Number) -> None:
        live.steps.set(live.steps.get() + active)
        steps = live.count()
        learning = active
        if group["meta_every"] > 1:
            learning = active & (steps % group["meta_every"] == 0)
        if group["meta_lr"] > 0:
            live.meta_step.set(live.meta_step.get() + learning)
        lr = live.lr.get()
        if group["base"] is not None and live.mixture is None:
            lr = lr / (1 - group["beta"] ** (steps + (steps < 1)))  # corrects the momentum for its start at zero
        age = live.age(steps)
        share = self._look_back(group, live, active) if live.x is not None else None
        if group["base"] is not None:
            live.change_unit_(active)
        if live.scale is not None:
            live.scale.follow_(live.lr.get(), active)
            self._learn_scales(group, live, steps, active, age)
        unit, momentum = live.unit, live.momentum.to(live.flat.dtype)
        step = lodo_step(
            live.gradient,
            momentum,
            live.operator,
            live.moments if state.uses_moments(group) else None,
            live.meta_step.get(),
            live.last_lr.get() * unit,
            lr * unit,
            active,
            learning,
            beta=group["beta"],
            meta_lr=group["meta_lr"],
            meta_optimizer=group["meta_optimizer"],
            max_condition=group["max_condition"],
            e=live.extras.get("trace"),
            trace=group["trace"],
            mixture=live.mixture,
            mix_lr=group["mix_lr"],
            steps=steps,
            age=age,
            share=share,
            idle=live.idle(group, active),
        )
        live.keep_momentum(momentum)
        self._move(group, live, step, lr, active)
        live.seal()

    def _look_back(self, group: dict[str, Any], live: state.GroupState, active: Number) -> Tensor | None:
        """Reads the parameters into `live.x`, and looks what has become of the last step.

        Returns:
            How much of it is left, between 0 and 1, shape (n,); None if nobody has changed the parameters since.
        """
        assert live.x is not None
        x, written = live.x, live.extras["written"]
        live.flat.gather(live.flat.tensors(group["params"]), live.x_parts)
        waits = group["base"] == "soap" or live.flat.device.type == "cpu"
        base = live.operator.base if isinstance(live.operator, Composite) else None
        if waits and not active:
            return None
        if waits and (torch.equal(x, written) or live.steps.get() <= 1):
            if base is not None:
                base.hold_(live.gradient, live.steps.get())
            return None
        change = (x - written).nan_to_num_(0.0, 0.0, 0.0)
        change = torch.where(active, change, 0) if is_tensor(active) else change
        made = live.operator.apply(live.momentum.to(x.dtype)).mul_(live.last_lr.get() * live.unit)
        step = live.operator.rotate_back(made)
        if group["weight_decay"] > 0:
            lr = live.last_lr.get() if live.scale is None else live.scale.levels[0]  # as nothing has shortened it
            step.add_(_decay(group, live, x, lr))
        rounding = x.abs().mul_(2 * live.flat.coarsest)
        if live.scale is not None:
            live.scale.correct_(change, taken_back(step, change, rounding, slack=1e-2))
        share = kept_share(step, change)
        if base is not None:
            # Each by itself, as in a box: of a projection that takes back some of all of them more would differ.
            is_held = taken_back(step, change, rounding, slack=1e-5) & (step * live.gradient > 0)
            base.hold_(live.gradient, live.steps.get(), is_held)
        return share

    def _learn_scales(
        self, group: dict[str, Any], live: state.GroupState, steps: Number, active: Number, age: Number | None
    ) -> None:
        assert live.scale is not None
        assert live.x is not None
        g = live.gradient
        if group["weight_decay"] > 0:
            # The loss that steps with this decay descend on has weight_decay / 2 <x, x> in the metric of D, of which
            # the tensor's mean is taken.
            base = live.operator.base if isinstance(live.operator, Composite) else None
            sizes = [1.0] * len(live.flat.lengths) if base is None else base.typical(steps - 1)
            pull = live.x.clone()
            on_host = live.flat.device.type == "cpu"
            torch._foreach_mul_(live.flat.views(pull), [float(size) for size in sizes] if on_host else sizes)
            g = g.add(pull, alpha=group["weight_decay"])
        active = active * (live.last_lr.get() > 0)  # steps of length zero have told nothing
        live.scale.learn_(g, group["scale_lr"], steps, active, age)

    def _move(self, group: dict[str, Any], live: state.GroupState, step: Tensor, lr: Number, active: Number) -> None:
        """Subtracts a step from the parameters that have a gradient, bounded, and with weight decay."""
        params = live.flat.tensors(group["params"])
        parts = live.flat.views(step)
        moves = [p.grad is not None for p in group["params"]]
        made_lr, is_finite = lr, True
        if group["max_step_norm"] is not None or live.x is not None:
            live.flat.mask_(parts, moves)
        if group["max_step_norm"] is not None or group["weight_decay"] != 0:
            # Into the memory of the gradient, which has done its work.
            live.flat.gather(params, live.gradient_parts)
        if group["max_step_norm"] is not None:
            live.flat.mask_(live.gradient_parts, moves)
            factor, is_finite = shorten_(step, live.gradient, group["max_step_norm"])
            made_lr = lr * factor
            live.skipped.set(live.skipped.get() + (is_finite == 0))
        live.last_lr.set(choose(active, made_lr, live.last_lr.get()))
        if group["weight_decay"] != 0:
            # Part of the one subtraction, so that a low-precision parameter is rounded once.
            decay = _decay(group, live, live.gradient, live.lr.get())
            step.add_(decay.mul_(active * is_finite))
            if live.x is not None:
                live.flat.mask_(parts, moves)
        if live.scale is not None:
            live.scale.record_(step, group["scale_trace"], active)
        moved = [tensor for tensor, is_moved in zip(params, moves, strict=True) if is_moved]
        if live.x is None:
            torch._foreach_sub_(moved, [part for part, is_moved in zip(parts, moves, strict=True) if is_moved])
            return
        written, views = live.extras["written"], live.written_parts
        kept = written.clone() if is_tensor(active) else None
        torch.sub(live.x, step, out=written)
        torch._foreach_copy_(moved, [view for view, is_moved in zip(views, moves, strict=True) if is_moved])
        if any(tensor.dtype != written.dtype for tensor in moved):
            live.flat.gather(params, views)  # as rounded
        if kept is not None:
            torch.where(active, written, kept, out=written)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def state_dict(self) -> StateDict:
        """As torch's; warns if the last step was broken off in the middle."""
        if self._is_broken_off:
            warn(NOT_WORTH_KEEPING)
        else:
            for group in self.param_groups:
                if state.lacks(state.needed(group), group, self.state):
                    self._group_state(group)  # starts it, so that a state that lacks it is known to have lost it
        return super().state_dict()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Loads a state dict, in its own precision: network and momentum are not cast to the parameters' dtype.

        Raises:
            ValueError: if the state is not LODO's, of another preconditioner, shape or format, or holds numbers that no
                training leaves (NaN, say); nothing has changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"state_dict must be a dict, got {type(state_dict).__name__}")
        last = self.register_load_state_dict_pre_hook(_check_and_wrap)
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        renewed = [group for group in self.param_groups if self._has_state(group) and state.is_bare(group, self.state)]
        for group in renewed:
            self._group_state(group)
        if renewed:
            warn(NEW_NETWORKS)
        elif self._has_momentum_alone:
            warn(LOST_NETWORK)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of an optimizer that must not go on must not either.
        return {**super().__getstate__(), **({"_is_broken_off": True} if self._is_broken_off else {})}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        unwrap(saved["state"])  # copies, so it comes before anything has changed: memory may run out
        super().__setstate__(saved)
        self._is_broken_off = saved.get("_is_broken_off", False)
        self._live, self._checked = {}, {}  # rebuilt from `self.state` when it is next needed
        self._next_warning = 1
        for name, value in ADDED.items():
            self.defaults.setdefault(name, value)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != "differentiable":  # torch's own, put among the defaults when they are restored
                    group.setdefault(name, value)

    def _has_state(self, group: dict[str, Any]) -> bool:
        return state.has_state(group, self.state)

    def _is_live(self, group: dict[str, Any]) -> bool:
        """Whether a step was taken on the group's state as it is, so that the next one has nothing to prepare."""
        live = self._live.get(group["params"][0])
        if live is None or not live.has_stepped or not live.is_bound_to(self.state, group):
            return False
        return state.has_all(group, live)

    def _group_state(self, group: dict[str, Any]) -> state.GroupState:
        """The live state of a group: kept from the last step, or made from `self.state`, or started."""
        live = self._live.get(group["params"][0])
        if live is not None and live.is_bound_to(self.state, group):
            return live if state.has_all(group, live) else self._keep(group, live)
        return self._keep(group, state.bind(group, self.state) if self._has_state(group) else state.start(group))

    def _keep(self, group: dict[str, Any], live: state.GroupState) -> state.GroupState:
        self._live.pop(group["params"][0], None)  # what stands in `self.state` counts, should this break off half-way
        if state.uses_moments(group) and not live.has_moments(group):
            live.start_moments(kept_dtype(group["meta_state_dtype"], live.flat.dtype))
        live.start_extras(group)
        live.publish(self.state, group)
        self._live[group["params"][0]] = live
        firsts = {each["params"][0] for each in self.param_groups if each["params"]}
        for gone in self._live.keys() - firsts:  # exchanged for other parameters
            del self._live[gone]
            self._checked.pop(gone, None)
        return live


class AutoLODO(LODO):
    """LODO that wants no tuning: `lodo.AutoLODO(model.parameters())` in place of `torch.optim.AdamW(...)`.

    The same optimizer as `lodo.LODO(params, **lodo.RECOMMENDED)`, and their states load into each other. It is a class
    of its own so that it can be named in a configuration by its path, without options.

    G = lr S^1/2 Q D^1/2 diag(exp(w)) D^1/2 Q^T S^1/2: Adam's second moment in the eigenbasis of each matrix's
    gradients, as SOAP has it (`base`), a learned gain for each coordinate there (w, `meta_lr`), and a learned scale S
    for each tensor (`scale_lr`), applied to a learned mixture of momenta (`decays`). docs/experiments.md tells what
    each brings.

    Args:
        params: as for `lodo.LODO`.
        lr: length of the first steps, elementwise. Its size hardly matters, for the scales learn it; schedules of it
            are followed.
        weight_decay: decoupled: x <- (1 - lr * S * weight_decay) x, in proportion to the steps that are taken.
        meta_lr: learning rate of the gains; at step t at most 30 / t.
        beta: decay of the momentum that the mixture starts near.
        trace: decay of the momenta that judge the gains.
        base: "soap", or "adam" for no eigenbases: much cheaper steps on large matrices. `None` wants lr tuned.
        scale_lr: learning rate of the logarithms of the scales; at step t at most 5 / t.
        scale_trace: decay of the steps that judge the scales.
        decays: of the momenta.
        mix_lr: learning rate of the momenta's weights; at step t at most 5 / t.
        meta_every, meta_state_dtype, momentum_dtype, max_step_norm, max_condition, maximize, capturable: as for
            `lodo.LODO`. capturable=True wants base="adam".
        others: as for `lodo.LODO`.

    Raises:
        As `lodo.LODO`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        *,
        meta_lr: float = 3e-3,
        beta: float = 0.9,
        trace: float = 0.99,
        base: str | None = "soap",
        scale_lr: float = 0.03,
        scale_trace: float = 0.998,
        decays: Sequence[float] | None = (0.0, 0.9, 0.99, 0.999),
        mix_lr: float = 0.01,
        meta_every: int = 1,
        meta_state_dtype: str | torch.dtype | None = None,
        momentum_dtype: str | torch.dtype | None = None,
        max_step_norm: float | None = None,
        max_condition: float | None = None,
        maximize: bool = False,
        capturable: bool = False,
        **others: Any,
    ) -> None:
        refuse_others(type(self).__name__, others)
        super().__init__(
            params,
            lr,
            meta_lr,
            beta,
            weight_decay,
            preconditioner=RECOMMENDED["preconditioner"],
            trace=trace,
            base=base,
            scale_lr=scale_lr,
            scale_trace=scale_trace,
            decays=decays,
            mix_lr=mix_lr,
            meta_every=meta_every,
            meta_state_dtype=meta_state_dtype,
            momentum_dtype=momentum_dtype,
            max_step_norm=max_step_norm,
            max_condition=max_condition,
            maximize=maximize,
            capturable=capturable,
        )


def _check_and_wrap(optimizer: Any, state_dict: StateDict) -> StateDict | None:
    """The last pre-hook of a load: refuses what does not fit, and keeps the rest from being cast."""
    ready = made_ready(state_dict, optimizer.param_groups, optimizer.defaults)
    if ready is None:
        return None  # torch refuses this itself
    found, optimizer._has_momentum_alone = ready
    return {**state_dict, "state": found}


def _decay(group: dict[str, Any], live: state.GroupState, x: Tensor, lr: Number) -> Tensor:
    """lr * weight_decay * S x, what weight decay subtracts: in proportion to the steps that are taken, as AdamW's."""
    if live.scale is None:
        return x * (lr * group["weight_decay"])
    decay = x.clone()
    factors = (live.scale.factors() * (lr * group["weight_decay"])).clamp_(max=1)  # to zero, not beyond
    torch._foreach_mul_(live.flat.views(decay), factors.tolist() if x.device.type == "cpu" else list(factors.unbind()))
    return decay


def _judge_all(groups: list[dict[str, Any]], states: list[state.GroupState]) -> list[tuple[Number, Number]]:
    """`judge` for each group. One unsound group makes those on its device unsound too: a step is taken whole or not.

    Groups that are sharded differently do not: what ranks have in common must not hang on what only one of them sees.
    """
    verdicts = [
        judge(live.measure(group), live.lr.get() / (1 - group["trace"]), live.flat.dtype, state.uses_moments(group))
        for group, live in zip(groups, states, strict=True)
    ]
    together: dict[Place, Number] = {}
    for live, (sound, _) in zip(states, verdicts, strict=True):
        together[live.flat.place] = sound & together.get(live.flat.place, True)
    return [(together[live.flat.place], idle) for live, (_, idle) in zip(states, verdicts, strict=True)]
