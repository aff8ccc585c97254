"""What LODO tells its user while it works, and where it says so."""

import sys
import warnings

BROKEN_OFF = (
    "LODO's step was broken off in the middle: parameters and optimizer state may no longer fit together. Load both "
    "from the last checkpoint; load_state_dict makes the optimizer ready again."
)
NOT_WORTH_KEEPING = f"The state is not worth keeping. {BROKEN_OFF}"
SKIPPED = (
    "LODO skipped a step: a gradient holds NaN or infinity (or is so large that its hypergradient would overflow), and "
    "nothing has changed; or the step itself overflowed, under max_step_norm, and no parameter has moved. "
    "`skipped_steps` counts such steps: {count} since the optimizer was made or loaded. If they go on, look for the "
    "first layer whose output is not finite, lower lr, or scale the loss down, as torch.amp.GradScaler does."
)
NEW_NETWORKS = (
    "LODO loaded a state that was saved with another number of shards, or other ones. Options, averages of iterates "
    "and, without a base, momentum go on; networks, eigenbases, scales and all else that belongs to shards does not "
    "fit, and starts anew."
)
LOST_NETWORK = (
    "LODO loaded momentum without the network that it belongs to, which starts anew. Either none had been saved, or "
    "torch.distributed.checkpoint has left it out, as it does with what was saved for parameters that are frozen now."
)


def warn(message: str) -> None:
    """Warns at the line that has called LODO: that in between are decorators and hooks of torch's, whose number
    depends on the call."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("lodo", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
