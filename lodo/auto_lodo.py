"""The optimizer `lodo.AutoLODO`: other defaults are a subclass."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lodo.optimizer import LODO
from lodo.options import INSTEAD, OPTIONS, RECOMMENDED, refuse_others


class AutoLODO(LODO):
    """LODO that wants no tuning: `lodo.AutoLODO(model.parameters())` in place of `torch.optim.AdamW(...)`.

    The same optimizer as `lodo.LODO(params, **lodo.RECOMMENDED)`, and their states load into each other. It is a class
    of its own so that it can be named in a configuration by its path, without options.

    G = lr S^1/2 Q D^1/2 diag(exp(w)) D^1/2 Q^T S^1/2: Adam's second moment in the eigenbasis of each matrix's
    gradients, as SOAP has it, of which long sides have the leading vectors (`base`), a learned gain for each coordinate
    there (w, `meta_lr`), and a learned scale S for each parameter (`scale_lr`), applied to a learned mixture of momenta
    (`momentum_decays`). docs/experiments.md tells what each brings.

    Args:
        params: as for `lodo.LODO`.
        lr: length of the first steps, elementwise. Its size hardly matters, for the scales learn it; schedules of it
            are followed.
        weight_decay: decoupled: x <- (1 - lr * S * weight_decay) x, in proportion to the steps that are taken.
        meta_lr: learning rate of the gains; at step t at most 30 / t.
        beta: decay of the momentum that the mixture starts near.
        trace_decay: decay of the momenta that judge the gains.
        base: "soap", or "adam" for no eigenbases: cheaper steps. `None` wants lr tuned.
        scale_lr: learning rate of the logarithms of the scales; at step t at most 5 / t.
        scale_trace_decay: decay of the steps that judge the scales.
        momentum_decays: of the momenta.
        mix_lr: learning rate of the momenta's weights; at step t at most 5 / t.
        average_share: None, or the share of the steps over which an average of the iterates is kept: .1, say.
        meta_every, meta_state_dtype, momentum_dtype, max_step_norm, max_condition, maximize, capturable, sharding: as
            for `lodo.LODO`. capturable=True wants base="adam".
        others: as for `lodo.LODO`.

    Raises:
        TypeError, ValueError, RuntimeError: as `lodo.LODO`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        *,
        meta_lr: float = 3e-3,
        beta: float = 0.9,
        trace_decay: float = 0.99,
        base: str | None = "soap",
        scale_lr: float = 0.03,
        scale_trace_decay: float = 0.998,
        momentum_decays: Sequence[float] | None = (0.0, 0.9, 0.99, 0.999),
        mix_lr: float = 0.01,
        average_share: float | None = None,
        meta_every: int = 1,
        meta_state_dtype: str | torch.dtype | None = None,
        momentum_dtype: str | torch.dtype | None = None,
        max_step_norm: float | None = None,
        max_condition: float | None = None,
        maximize: bool = False,
        capturable: bool = False,
        sharding: str = "local",
        **others: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            meta_lr,
            beta,
            weight_decay,
            preconditioner=RECOMMENDED["preconditioner"],
            trace_decay=trace_decay,
            base=base,
            scale_lr=scale_lr,
            scale_trace_decay=scale_trace_decay,
            momentum_decays=momentum_decays,
            mix_lr=mix_lr,
            average_share=average_share,
            meta_every=meta_every,
            meta_state_dtype=meta_state_dtype,
            momentum_dtype=momentum_dtype,
            max_step_norm=max_step_norm,
            max_condition=max_condition,
            maximize=maximize,
            capturable=capturable,
            sharding=sharding,
            **_options_of_parts(type(self).__name__, others),
        )


def _options_of_parts(name: str, others: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those that parts have which have been added to `lodo.parts.PARTS`; other arguments are refused."""
    refuse_others(name, {key: value for key, value in others.items() if key in INSTEAD or key not in OPTIONS})
    return others
