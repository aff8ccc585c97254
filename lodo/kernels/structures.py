"""What the compiled passes over a param group are given, field by field as parts.cpp declares it.

Pointers are addresses (`Tensor.data_ptr`), null for what a group does not have.
"""

import ctypes

Descent = ctypes.c_double * 5
"""`lodo.inner_optimizer.Descent`."""
Rates = ctypes.c_double * 4
"""`lodo.inner_optimizer.Rates`, without the count."""


class Cohort(ctypes.Structure):
    """The numbers of a step of parameters that share them (`lodo.context.Cohort`), each from the part that has it."""

    _fields_ = [
        ("active", ctypes.c_double),
        ("steps", ctypes.c_double),
        ("lr", ctypes.c_double),
        ("last_lr", ctypes.c_double),
        ("peak_lr", ctypes.c_double),
        ("inner", Rates),
        ("beta", ctypes.c_double),
        ("trace_decay", ctypes.c_double),
        ("momentum_bias", ctypes.c_double),
        ("square_weight", ctypes.c_double),
        ("square_bias", ctypes.c_double),
        ("inverse_unit", ctypes.c_double),
        ("scale", Descent),
        ("mixture", Descent),
        ("steps_behind", ctypes.c_double),
        ("step_weight", ctypes.c_double),
        ("brake", ctypes.c_double),
    ]


class Group(ctypes.Structure):
    """Where what a param group has lies in memory, and the constants of its parts."""

    _fields_ = [
        # The parameters: where each begins in vectors of n numbers (k + 1), and its cohort's number (k).
        ("offsets", ctypes.c_void_p),
        ("cohort", ctypes.c_void_p),
        ("parameters", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("tiny", ctypes.c_double),
        # Vectors of a step.
        ("gradient", ctypes.c_void_p),
        ("momentum", ctypes.c_void_p),
        ("step", ctypes.c_void_p),
        ("diagonal", ctypes.c_void_p),
        ("trace", ctypes.c_void_p),
        ("idle", ctypes.c_void_p),
        # The logarithms of an elementwise network, and its inner optimizer.
        ("theta", ctypes.c_void_p),
        ("theta_mean", ctypes.c_void_p),
        ("theta_square", ctypes.c_void_p),
        ("theta_eps", ctypes.c_double),
        ("largest_theta", ctypes.c_double),
        # Adam's second moment.
        ("square", ctypes.c_void_p),
        ("shares", ctypes.c_void_p),
        ("eps", ctypes.c_double),
        ("longest", ctypes.c_double),
        # Scales of the parameters.
        ("scale", ctypes.c_void_p),
        ("scale_peak", ctypes.c_void_p),
        ("step_trace", ctypes.c_void_p),
        ("largest_log_scale", ctypes.c_double),
        ("progress", ctypes.c_void_p),
        ("clear", ctypes.c_double),
        ("sure", ctypes.c_double),
        ("clear_fall", ctypes.c_double),
        ("least", ctypes.c_double),
        # The learned mixture of momenta.
        ("momenta", ctypes.c_void_p),
        ("mixture", ctypes.c_void_p),
        ("decays", ctypes.c_void_p),
        ("decay_count", ctypes.c_int64),
        ("coast", ctypes.c_double),
        ("largest_logit", ctypes.c_double),
        ("recent_energy", ctypes.c_void_p),
        ("recent_weight", ctypes.c_double),
        ("long_momentum", ctypes.c_double),
        # Whether parts are to learn from the last step in the pass over lines 1 and 2.
        ("judges_step", ctypes.c_int64),
    ]


class Network(ctypes.Structure):
    """A network and its inner step, as networks.cpp takes it; LODO-Residuals is one of blocks of one number."""

    _fields_ = [
        ("theta", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("square", ctypes.c_void_p),
        ("permutations", ctypes.c_void_p),
        ("work", ctypes.c_void_p),
        ("layers", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("is_bfloat16", ctypes.c_int64),
        ("lr", ctypes.c_double),
        ("inner", Rates),
        ("count", ctypes.c_double),
        ("eps", ctypes.c_double),
    ]
