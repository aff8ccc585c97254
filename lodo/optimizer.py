"""The optimizer `lodo.LODO`: the protocol of `torch.optim` only. `lodo.step` has the algorithm."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from lodo import diagnostics
from lodo.messages import BROKEN_OFF, LOST_NETWORK, NEW_NETWORKS, NOT_WORTH_KEEPING, SKIPPED, warn
from lodo.options import (
    OPTIONS,
    check_options,
    made_plain,
    refuse_others,
    refuse_part,
)
from lodo.parts import PARTS
from lodo.preconditioners import Operator, Preconditioner
from lodo.scalars import is_tensor
from lodo.state import averages
from lodo.state.checks import prepare_state_dict, unwrap
from lodo.state.flat import check_parameters, has_gradients, is_flattened
from lodo.state.group_state import GroupState
from lodo.state.layout import State, contiguous
from lodo.state.live_groups import LiveGroups
from lodo.state.loading import Loaded
from lodo.state.sharding import split_by_ranks
from lodo.step import check_gradients, take_step_


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
        weight_decay: decoupled, x <- (1 - lr * S * weight_decay) x with the scale S of each parameter, if there are any
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
        trace_decay: decay, in [0, 1), of the momenta that the hypergradient judges: their trace
            e <- trace_decay * e + m, in place of the last one alone. 0 is the paper.
        base: None, or what G is before anything is learned: "adam" for 1 / (sqrt(v) + 1e-8), "soap" for the same in the
            eigenbasis of each matrix's gradients (waits on CUDA). lr and the momentum's correction are then Adam's.
        scale_lr: learning rate of a logarithmic scale per parameter, as part of G; 0: there is none. See
            `lodo.parts.tensor_scale`.
        scale_trace_decay: decay, in [0, 1), of the steps that the scales' hypergradient judges.
        momentum_decays: None, or several, each in [0, 1), of momenta whose weights are learned for each parameter:
            their mixture takes the place of the single momentum, and starts near that of decay `beta`. See
            `lodo.parts.mixture`.
        mix_lr: learning rate of these weights.
        average_share: None, or the share of the steps so far, > 0 and <= 1, over which an average of the iterates is
            kept (`lodo.parts.average`; .1, say), 4 bytes a parameter. `averaged` and `eval` show it.
        max_step_norm: the longest step, relative to the parameters: a step longer than max_step_norm * |x| over its
            param group (or than if x had a root mean square of 1e-3) is shortened to that. To the hypergradient it is a
            step of a smaller lr. Weight decay comes on top.
        max_condition: K >= 1, the largest condition number of G: every inner step is followed by the projection of the
            blocks to singular values in [1 / r, r], r = K ** (1 / (4 * depth)), so that the eigenvalues of G / lr stay
            in [K ** -0.5, K ** 0.5]. Not for "residual". On CUDA it makes the host wait.
        maximize: ascend instead of descend.
        capturable: allow `step` to be captured in a CUDA graph, after at least one step outside; see `step`.
        seed: of the initial network; gives the same numbers on every device.
        sharding: of parameters that are DTensors: "local", each rank learns of its own shards, or "whole", each tensor
            has an owner that steps on all of it, as one process would (not for the paper's networks).
        others: options of parts that have been added to `lodo.parts.PARTS`; and arguments of other optimizers that ask
            for nothing, as factories pass them to all: `foreach`, `fused`, `differentiable` and `amsgrad` that are None
            or False.

    Raises:
        TypeError: for arguments that LODO does not have.
        ValueError: for arguments out of range, naming argument, value and what is allowed; for sparse, complex or
            integer parameters; for a param group on two devices.
        RuntimeError: in `step`, for sparse gradients, before anything has changed.

    Parameters without a gradient are not written. With `lodo.AutoLODO` what is kept for them stays as it is, and each
    counts its own steps, as with Adam. The paper's networks act on a param group as a whole: there a missing gradient
    counts as zero, once the parameter has had one. A step whose gradient holds a NaN or an infinity changes nothing;
    see `skipped_steps`.
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
        trace_decay: float = 0.0,
        base: str | None = None,
        scale_lr: float = 0.0,
        scale_trace_decay: float = 0.998,
        momentum_decays: Sequence[float] | None = None,
        mix_lr: float = 0.01,
        average_share: float | None = None,
        meta_every: int = 1,
        meta_state_dtype: str | torch.dtype | None = None,
        momentum_dtype: str | torch.dtype | None = None,
        max_step_norm: float | None = None,
        max_condition: float | None = None,
        maximize: bool = False,
        capturable: bool = False,
        seed: int = 0,
        sharding: str = "local",
        **others: Any,
    ) -> None:
        given = dict(locals())
        refuse_others(type(self).__name__, {name: value for name, value in others.items() if name not in OPTIONS})
        defaults = {name: others.get(name, given.get(name, option.default)) for name, option in OPTIONS.items()}
        check_options(defaults)
        made_plain(defaults)
        self._groups = LiveGroups()
        self._next_warning = 1  # so many skipped steps
        self._is_broken_off = False
        # Of the state dict that was loaded last: it was of another number of shards, or had lost networks.
        self._has_new_networks = self._has_momentum_alone = False
        super().__init__(params, defaults)
        if isinstance(preconditioner, Preconditioner):
            # Options stay plain numbers and strings; a group added later starts with the same architecture.
            self.defaults.update(preconditioner.options)

    def reset(self, group: int | None = None) -> None:
        """Lets learning begin anew where the data have changed: scales, gains and the weights of the momenta, which
        learn ever more slowly in a long training, go back to their start and learn at least as fast as there; averages
        of the iterates begin anew. What is known of the gradients stays (momenta, second moments, eigenbases), and so
        do the counts of steps. The paper's method learns at a constant rate, and is left as it is.

        Args:
            group: index of a param group; None for all.

        Raises:
            ValueError: if there is no such group.
        """
        if group is not None and (type(group) is not int or not 0 <= group < len(self.param_groups)):
            raise ValueError(f"group must be None or 0 to {len(self.param_groups) - 1}, got {group!r}")
        for each in self.param_groups if group is None else [self.param_groups[group]]:
            if self._has_state(each):
                self._group_state(each).reset_()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, during training too, with its own network: several, if not all are sharded over the same ranks.
        Options default to the constructor's.

        Raises:
            TypeError, ValueError: as the constructor; the optimizer is as before then.
        """
        before = len(self.param_groups)
        try:
            for each in (parts := split_by_ranks(param_group, self.defaults["sharding"])):
                self._add_param_group(each, is_part=len(parts) > 1)
        except Exception:
            del self.param_groups[before:]
            raise

    def _add_param_group(self, param_group: dict[str, Any], is_part: bool) -> None:
        learned = None
        if isinstance(param_group, dict):
            options = {**self.defaults, **param_group}
            check_options(options)
            if isinstance(learned := options["preconditioner"], Preconditioner):
                refuse_part(learned, is_part)
                param_group = {**param_group, **learned.options}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["params"] = list(dict.fromkeys(group["params"]))  # torch only warns of one that is given twice
        made_plain(group)
        check_parameters(group["params"], group["sharding"] == "whole")
        for part in PARTS:
            if part.is_used(group):
                part.check(group, is_flattened(group["params"]))
        if isinstance(learned, Preconditioner):
            self._groups.keep(group, GroupState(group, self.state, learned), self.param_groups)

    @property
    def is_at_averages(self) -> bool:
        """Whether `eval` has put the parameters at their averages."""
        return any(averages.are_shown(group, self.state) for group in self.param_groups)

    @property
    def preconditioners(self) -> list[Operator | None]:
        """The learned preconditioner of each param group, None before the group's first step: a
        `lodo.preconditioners.Composite` where parts have factors of G beside the network's. They go on learning.
        """
        return [self._group_state(group).operator if self._has_state(group) else None for group in self.param_groups]

    @torch.inference_mode(False)
    @torch.no_grad()
    def eval(self) -> None:
        """Puts the parameters at the averages of their iterates (`average_share`), to be evaluated or deployed.

        `step` refuses to go on before `train`; the state keeps, and saves, the parameters themselves meanwhile. Twice,
        or without averages, it does nothing: tools that know such methods, as Hugging Face's Trainer does, may call it.
        """
        asked = [group for group in self.param_groups if group["average_share"] is not None and self._has_state(group)]
        hidden = [group for group in asked if not averages.are_shown(group, self.state)]
        self._groups.gather(hidden, with_gradients=False)
        averages.show_([(self._group_state(group), *self._own(group)) for group in hidden])
        self._groups.scatter(hidden, all_of_them=True)
        self._groups.mark(hidden, self.state)

    @torch.inference_mode(False)
    @torch.no_grad()
    def train(self) -> None:
        """Puts the parameters back, bit for bit, after `eval`, whatever was written into them since."""
        shown = [group for group in self.param_groups if averages.are_shown(group, self.state)]
        for group in shown:
            averages.hide_(self._group_state(group), *self._own(group))
        self._groups.scatter(shown, all_of_them=True)
        self._groups.mark(shown, self.state)

    def averaged(
        self, model: nn.Module | None = None, batches: Iterable[Any] | None = None
    ) -> AbstractContextManager[None]:
        """Inside, the parameters are as after `eval`; training goes on as if nobody had asked.

        Args:
            model: to be given with FSDP2, whose gathered copies are then renewed, and for `batches`.
            batches: of inputs, for the statistics of batch normalisation at the averages, computed as
                `torch.optim.swa_utils.update_bn` does; they are put back too.

        Raises:
            ValueError: if no param group keeps averages, or for batches without a model, or an empty iterable of them.
        """
        if all(group["average_share"] is None for group in self.param_groups):
            raise ValueError("average_share must be a number in some param group, got None in all (as loaded, perhaps)")
        if batches is not None and model is None:
            raise ValueError(f"model must be given for batches, got None and {batches!r}")
        return averages.shown(self, model, batches)

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out because of gradients with NaN or infinity, or by `max_step_norm` because they
        overflowed (the largest count over the groups). Reading it waits for the device.
        """
        lives = [self._group_state(group) for group in self.param_groups if self._has_state(group)]
        return max((int(live.counts.skipped.tensor.max()) for live in lives), default=0)

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

        On several ranks the figures of sharded groups are of this rank's shard; with `sharding="whole"` of the tensors
        that it owns, gradients and parameters as in the last step.
        """
        return [
            diagnostics.figures(self._own(group)[0], self._group_state(group), probes, iterations)
            if self._has_state(group)
            else {}
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
        """Takes one step on the gradients in `.grad`; see `lodo.step`.

        In a CUDA graph (`capturable=True`) an lr that is to change between replays must be a tensor on the device; the
        other options are fixed when the graph is captured, and so is which parameters have a gradient: the same as in
        the step before. Skipped steps are counted there, without a warning. After loading or exchanging state, after
        `reset`, and after a change of an option that state depends on, capture anew.

        Args:
            closure: reevaluates the model and returns the loss, which is returned.

        Raises:
            RuntimeError: for sparse gradients, parameters without data, state of other groups, or a capture that is not
                allowed; nothing has changed then. Also after a step that was broken off in the middle, until a state is
                loaded: an exception such as torch.OutOfMemoryError that comes while parameters and state change has a
                note that says so. And while the parameters are at their averages (`eval`).
        """
        must_wait = self._is_broken_off and not self._groups.are_replaced(self.param_groups, self.state)
        if must_wait and any(group["lr"] != 0 for group in self.param_groups):
            raise RuntimeError(BROKEN_OFF)
        averages.refuse_shown(self.param_groups, self.state)
        is_captured = self._is_captured()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self._groups.with_gradients(self.param_groups)
        for group in groups:
            self._groups.check_changes(group)
        lives = [self._group_state(group) for group in groups]
        works = [self._own(group)[0] for group in groups]
        for group, live in zip(works, lives, strict=True):
            live.flat.gather(live.flat.gradients(group["params"]), live.gradient_views)
            if group["maximize"]:
                live.gradient.neg_()
            live.counts.lr.set(group["lr"])
        verdicts = check_gradients(works, lives)
        if must_wait:
            return loss  # lr = 0: distributed checkpointing makes the state that it will load into
        # Up to here nothing has changed. A capture only records, so that one which fails changes nothing either.
        self._is_broken_off = not is_captured
        try:
            for group, live, (is_sound, is_idle) in zip(works, lives, verdicts, strict=True):
                if is_tensor(is_sound) or not is_sound:
                    live.counts.skipped.add(is_sound == 0)
                active = is_sound > is_idle
                if is_tensor(active) or active:
                    take_step_(live, live.begin(group, active), group["params"])
            self._groups.scatter(groups)
        except BaseException as error:
            if self._is_broken_off:
                error.add_note(BROKEN_OFF)
            raise
        self._is_broken_off = False
        for group, live, (is_sound, _) in zip(groups, lives, verdicts, strict=True):
            if not is_captured and (is_tensor(is_sound) or not is_sound or group["max_step_norm"] is not None):
                self._warn_of_skips(live)
        return loss

    def _is_captured(self) -> bool:
        """Whether this call is being captured in a CUDA graph.

        Raises:
            RuntimeError: if it is and a group does not allow it, or has no state yet.
        """
        if not torch.cuda.is_initialized() or not torch.cuda.is_current_stream_capturing():
            return False
        if not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError("capturable must be True in every param group for LODO.step to be captured, got False")
        if not all(
            self._groups.is_live(group, self.state) for group in self.param_groups if has_gradients(group["params"])
        ):
            raise RuntimeError(
                "LODO prepares its state at the first step and at the first one after a load, which cannot be captured "
                "in a CUDA graph; take at least one step before the capture"
            )
        return True

    def _warn_of_skips(self, live: GroupState) -> None:
        """Warns when the host learns of the first skipped step, of the tenth, the hundredth, ..."""
        skips = live.counts.new_skips()
        if skips >= self._next_warning:
            while skips >= self._next_warning:
                self._next_warning *= 10
            warn(SKIPPED.format(count=skips))

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def state_dict(self) -> StateDict:
        """As torch's; warns if the last step was broken off in the middle."""
        if self._is_broken_off:
            warn(NOT_WORTH_KEEPING)
        else:
            self._groups.gather(list(filter(self._has_state, self.param_groups)), with_gradients=False)
            for group in self.param_groups:
                if self._has_state(group):
                    self._group_state(group)  # starts what is missing, so that a state that lacks it has lost it
        first = self.register_state_dict_post_hook(_as_saved, prepend=True)
        try:
            return super().state_dict()
        finally:
            first.remove()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Loads a state dict, in its own precision: network and momentum are not cast to the parameters' dtype.

        Raises:
            ValueError: if the state is not LODO's, of another preconditioner or shape, or holds numbers that no
                training leaves (NaN, say); nothing has changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"state_dict must be a dict, got {type(state_dict).__name__}")
        last = self.register_load_state_dict_pre_hook(_check_and_wrap)
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        if self._has_new_networks:
            self._groups.gather(list(filter(self._has_state, self.param_groups)), with_gradients=False)
            for group in self.param_groups:
                if self._has_state(group):
                    self._group_state(group)
            warn(NEW_NETWORKS)
        elif self._has_momentum_alone:
            warn(LOST_NETWORK)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of an optimizer that must not go on must not either.
        broken = {"_is_broken_off": True} if self._is_broken_off else {}
        ranks = self._groups.owner_ranks(self.param_groups)
        return {**super().__getstate__(), **broken, **({"_owner_ranks": ranks} if any(ranks) else {})}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        unwrap(saved["state"])  # copies, so it comes before anything has changed: memory may run out
        super().__setstate__(saved)
        self._is_broken_off = saved.get("_is_broken_off", False)
        self._next_warning = 1
        for group in self.param_groups:
            for name, option in OPTIONS.items():
                group.setdefault(name, self.defaults.get(name, option.default))
        ranks = self.__dict__.pop("_owner_ranks", ())
        self._groups = LiveGroups(getattr(self, "_groups", None), self.param_groups, self.state, ranks)

    def _has_state(self, group: dict[str, Any]) -> bool:
        return self._groups.has_state(group, self.state)

    def _own(self, group: dict[str, Any]) -> tuple[dict[str, Any], State]:
        return self._groups.own(group, self.state)

    def _group_state(self, group: dict[str, Any]) -> GroupState:
        return self._groups.live(group, self.state, self.param_groups)


def _as_saved(optimizer: Any, state_dict: StateDict) -> None:
    """The first post-hook of a state dict: tensors without gaps, and whole ones spread over the ranks of their owners,
    unless one of them may be in the middle of a step."""
    state, groups = state_dict["state"], optimizer._groups
    for packed in state_dict["param_groups"]:
        state.update((key, contiguous(state[key])) for key in packed["params"] if key in state)
    if optimizer._is_broken_off:
        return
    for group, packed in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        if (owners := groups.owners(group)) is not None and groups.has_state(group, optimizer.state):
            live = groups.live(group, optimizer.state, optimizer.param_groups)
            shown = owners.shown(live, groups.own(group, optimizer.state)[1])
            state.update(zip(packed["params"], shown, strict=True))


def _check_and_wrap(optimizer: Any, state_dict: StateDict) -> StateDict | None:
    """The last pre-hook of a load: refuses what does not fit, and keeps the rest from being cast."""
    loaded = Loaded(state_dict, optimizer.param_groups, list(map(optimizer._groups.owners, optimizer.param_groups)))
    prepared = loaded.checked(lambda: prepare_state_dict(loaded.state_dict, loaded.groups, optimizer.defaults))
    if prepared is None:
        return None  # torch refuses this itself
    optimizer._has_new_networks = loaded.anywhere(prepared.has_new_networks)
    optimizer._has_momentum_alone = prepared.has_lost_networks
    return loaded.completed(prepared.state)
