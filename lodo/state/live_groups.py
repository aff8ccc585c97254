"""The param groups of an optimizer at work: what this rank has of each, and its live state."""

from collections.abc import Sequence
from typing import Any, Optional

from torch import Tensor

from lodo.messages import LOST_NETWORK, warn
from lodo.options import OPTIONS, all_values, check_fixed, check_lr, check_options, fixed_options, state_values
from lodo.state.flat import has_gradients
from lodo.state.group_state import GroupState, has_state
from lodo.state.layout import State, slots_of
from lodo.state.owners import Owners, are_owned
from lodo.state.sharding import local

Group = dict[str, Any]


class LiveGroups:
    """What is known of param groups from one step to the next. Nothing is lost without it: all is made anew of
    `optimizer.state`, which every method that reads it is given, for others may exchange it.

    Args:
        former: of the same optimizer, before its state was exchanged.
        groups, state: of the optimizer, if there is state.
        owners: of the parameters of each group, as `owner_ranks` gives them, of the optimizer that this is a copy of.
    """

    def __init__(
        self,
        former: Optional["LiveGroups"] = None,
        groups: Sequence[Group] = (),
        state: State | None = None,
        owners: Sequence[Sequence[int]] = (),
    ) -> None:
        # All by the first parameter of a group.
        self._live: dict[Tensor, GroupState] = {}
        self._owners: dict[Tensor, Owners] = {} if former is None else former._owners
        self._checked: dict[Tensor, tuple[Any, ...]] = {}
        self._fixed: dict[Tensor, dict[str, Any]] = {}  # the options of groups with state that may not change
        for group, ranks in zip(groups, owners, strict=False):
            if ranks:
                self._owners[group["params"][0]] = Owners(
                    group["params"], dict(zip(map(id, group["params"]), ranks, strict=True))
                )
        for group in groups:
            if group["params"] and self.has_state(group, {} if state is None else state):
                self._fixed[group["params"][0]] = fixed_options(group)

    # ---- what this rank has of a group ----------------------------------------------------------------------------

    def owners(self, group: Group) -> Owners | None:
        """Those of the tensors of a group; None if it has none."""
        if not are_owned(group):
            return None
        params = group["params"]
        owners = self._owners.get(params[0])
        if owners is None or not owners.fits(params):
            known = {key: rank for each in self._owners.values() for key, rank in each.by_id.items()}
            mesh, device = params[0].device_mesh, local(params[0]).device
            exchanges = [each.exchange for each in self._owners.values() if each.ranks == (device, mesh)]
            owners = self._owners[params[0]] = Owners(params, known, next(iter(exchanges), None))
        return owners

    def owner_ranks(self, groups: Sequence[Group]) -> list[list[int]]:
        """The owner of each parameter of each group; none where they have none. A copy of the optimizer goes on with
        them."""
        found = [self.owners(group) for group in groups]
        return [[] if owners is None else owners.owners for owners in found]

    def own(self, group: Group, state: State) -> tuple[Group, State]:
        """A group as this rank works on it, and its state: the whole tensors that are this rank's, if they have
        owners."""
        owners = self.owners(group)
        return (group, state) if owners is None else owners.work(group, state)

    def _all_owners(self, groups: Sequence[Group]) -> list[Owners]:
        return [owners for group in groups if (owners := self.owners(group)) is not None]

    def gather(self, groups: Sequence[Group], with_gradients: bool = True) -> None:
        """Brings parameters and gradients to their owners."""
        for finish in [owners.gather(with_gradients) for owners in self._all_owners(groups)]:
            finish()

    def scatter(self, groups: Sequence[Group], all_of_them: bool = False) -> None:
        """Brings the parameters back from their owners: those with gradients, or all."""
        for finish in [owners.scatter(all_of_them) for owners in self._all_owners(groups)]:
            finish()

    def mark(self, groups: Sequence[Group], state: State) -> None:
        """Tells in the state what other ranks have."""
        for owners in self._all_owners(groups):
            owners.mark_(state)

    def with_gradients(self, groups: Sequence[Group]) -> list[Group]:
        """Those in which a parameter has a gradient, on any rank if they have owners, who then have it."""
        found = [(group, has_gradients(group["params"])) for group in groups]
        self.gather(groups)
        return [
            group for group, has in found if (has if (owners := self.owners(group)) is None else owners.has_gradients)
        ]

    # ---- live states ----------------------------------------------------------------------------------------------

    def has_state(self, group: Group, state: State) -> bool:
        """Whether there is state for a group, on any rank if it has owners."""
        if are_owned(group):
            return any(not {"shards", "momentum"}.isdisjoint(state.get(p, ())) for p in group["params"])
        return has_state(group["params"], state)

    def check_changes(self, group: Group) -> None:
        """Refuses options that were written into a param group since the last step, if they are out of range."""
        check_lr("lr", group["lr"])  # each time, for schedulers write it
        values = all_values(group)
        if self._checked.get(group["params"][0]) != values:
            check_options(group)
            if (former := self._fixed.get(group["params"][0])) is not None:
                check_fixed(group, former)
            self._checked[group["params"][0]] = values

    def are_replaced(self, groups: Sequence[Group], state: State) -> bool:
        """Whether all state was exchanged since the last step, as ZeroRedundancyOptimizer does past
        `load_state_dict`."""
        firsts = [group["params"][0] for group in groups if group["params"]]
        lives = [self._live[first] for first in firsts if first in self._live]
        return bool(lives) and all(live.is_replaced(state) for live in lives)

    def is_live(self, group: Group, state: State) -> bool:
        """Whether a step was taken on the group's state as it is, so that the next one has nothing to prepare."""
        live = self._live.get(group["params"][0])
        return live is not None and live.has_stepped and self._is_up_to_date(live, group, state)

    def _is_up_to_date(self, live: GroupState, group: Group, state: State) -> bool:
        own, entries = self.own(group, state)
        if not live.is_bound_to(entries, own["params"]):
            return False
        if all_values(live.options) == all_values(group):
            return True
        check_fixed(group, live.options)
        if any(
            live.options[name] != OPTIONS[name].plain(group[name]) for name in ("meta_state_dtype", "momentum_dtype")
        ):
            return False
        if state_values(live.options) != state_values(group) and slots_of(group, live.names) != live.layout.slots:
            return False
        live.options.update({name: group[name] for name in OPTIONS})
        return True

    def live(self, group: Group, state: State, groups: Sequence[Group]) -> GroupState:
        """The live state of one of the groups: kept from the last step, or made of `state`, or started."""
        first = group["params"][0]
        live = self._live.get(first)
        if live is not None and self._is_up_to_date(live, group, state):
            return live
        self._live.pop(first, None)  # what stands in `state` counts, should this break off half-way
        if (owners := self.owners(group)) is not None:
            owners.restore_(group, state)
        self.mark([group], state)
        live = self.keep(group, GroupState(*self.own(group, state), together=owners), groups)
        self.mark([group], state)
        return live

    def keep(self, group: Group, live: GroupState, groups: Sequence[Group]) -> GroupState:
        """Keeps the live state of one of the groups."""
        if live.has_lost_network:
            warn(LOST_NETWORK)
        first = group["params"][0]
        self._live[first], self._fixed[first] = live, fixed_options(group)
        firsts = {each["params"][0] for each in groups if each["params"]}
        known: list[dict[Tensor, Any]] = [self._live, self._owners, self._checked, self._fixed]
        for each in known:
            for gone in each.keys() - firsts:  # exchanged for other parameters
                del each[gone]
        return live
