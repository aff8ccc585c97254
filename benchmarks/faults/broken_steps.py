"""A step is broken off: memory runs out at every torch operation in turn, or Ctrl-C comes at every line of lodo.

What must hold each time: either nothing has changed and training goes on as if nothing had been; or the step was done;
or the optimizer refuses to go on until a state is loaded, from which training goes on as if nothing had been.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lodo
from benchmarks.faults.training import CASES, KERNELS, Training, fingerprint, kernels

LODO_FOLDER = str(Path(lodo.__file__).parent)
AFTER = 2  # steps that are taken after the fault
MOMENTS = {"first step": 0, "later step": 2, "step after a load": 2, "load": 2}  # after how many steps
GOOD = ("nothing changed", "step done", "refused until loaded")


class RunsOut(TorchDispatchMode):
    """Memory runs out at the operation number `at`, counted from 1."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.at:
            raise torch.OutOfMemoryError("injected")
        return func(*args, **(kwargs or {}))


@contextmanager
def interrupted(at: int) -> Iterator[list[int]]:
    """Ctrl-C at the line number `at` of the library that is run, counted from 1; gives the count of those run."""
    count = [0]

    def on_line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            count[0] += 1
            if count[0] == at:
                raise KeyboardInterrupt
        return on_line

    def on_call(frame: FrameType, event: str, _: Any) -> Any:
        return on_line if frame.f_code.co_filename.startswith(LODO_FOLDER) else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield count
    finally:
        sys.settrace(before)


def cases() -> list[str]:
    """All that is injected, by name.

    Ctrl-C comes on the compiled kernels only: the others add lines where the step has begun to change things. It does
    not come in a load, which it may break off when it is done; who presses it knows.
    """
    memory = [
        f"memory runs out; {moment}; {case}; {kernel}" for moment in MOMENTS for case in CASES for kernel in KERNELS
    ]
    steps = [moment for moment in MOMENTS if moment != "load"]
    return memory + [f"Ctrl-C; {moment}; {case}; native" for moment in steps for case in CASES]


def run(name: str, every: int = 1) -> dict[str, Any]:
    """Injects one fault at every place, or at every so many, one after the other, and counts the outcomes."""
    fault, moment, case, kernel = name.split("; ")
    with kernels(kernel):
        outcomes = inject_everywhere(fault, moment, case, every)
    return {"injected": outcomes.total(), "outcomes": dict(sorted(outcomes.items()))}


def inject_everywhere(fault: str, moment: str, case: str, every: int) -> Counter[str]:
    expected = reached(moment, case)
    saved = expected.state()
    expected.advance(MOMENTS[moment], MOMENTS[moment] + 1)
    after_one = fingerprint(expected.state())
    expected.advance(MOMENTS[moment] + 1, MOMENTS[moment] + AFTER)
    after_all = fingerprint(expected.state())
    outcomes: Counter[str] = Counter()
    while True:
        training = reached(moment, case)
        if moment == "load":
            training.optimizer.step()  # so that what is there is another state than the one to be loaded
        training.set_gradients(MOMENTS[moment])
        error = inject(fault, 1 + every * outcomes.total(), action(moment, training, saved))
        if error is None:
            return outcomes
        if moment == "load":
            outcomes[judge_load(training, moment, case, saved, after_all)] += 1
        else:
            outcomes[judge_step(training, error, moment, saved, after_one, after_all)] += 1


def reached(moment: str, case: str) -> Training:
    """A training that stands before the step in which the fault comes."""
    training = Training(case)
    training.advance(0, MOMENTS[moment])
    if moment == "step after a load":
        training.load(training.state())
    return training


def action(moment: str, training: Training, saved: dict[str, Any]) -> Callable[[], Any]:
    if moment == "load":
        return lambda: training.optimizer.load_state_dict(saved["optimizer"])
    return training.optimizer.step


def inject(fault: str, at: int, act: Callable[[], Any]) -> BaseException | None:
    """Acts, with the fault at place number `at`; None if the action was over before."""
    count: Callable[[], int]
    try:
        if fault == "Ctrl-C":
            with interrupted(at) as lines:
                act()
            count = lambda: lines[0]  # noqa: E731
        else:
            with RunsOut(at) as mode:
                act()
            count = lambda: mode.count  # noqa: E731
    except (torch.OutOfMemoryError, KeyboardInterrupt) as error:
        return error
    if count() >= at:
        raise AssertionError(f"{fault} at place {at} was swallowed")
    return None


def judge_step(
    training: Training, error: BaseException, moment: str, saved: dict[str, Any], after_one: str, after_all: str
) -> str:
    """What became of a training in whose step a fault came; anything that is not in `GOOD` is a defect."""
    step = MOMENTS[moment]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this state is not worth keeping
        found = training.state()
    training.set_gradients(step)
    is_refused = False
    try:
        if fingerprint(found) == after_one:
            training.advance(step + 1, step + AFTER)
            return "step done" if fingerprint(training.state()) == after_all else "LOST: goes on differently"
        training.optimizer.step()
    except RuntimeError:
        is_refused = True
    if not is_refused:
        training.advance(step + 1, step + AFTER)
        if not is_unchanged(found, saved):
            return "LOST: changed without a word"
        return "nothing changed" if fingerprint(training.state()) == after_all else "LOST: goes on differently"
    is_noted = any("broken off" in note for note in getattr(error, "__notes__", ()))
    if isinstance(error, torch.OutOfMemoryError) and not is_noted:
        return "LOST: no note"
    training.load(saved)
    training.advance(step, step + AFTER)
    return "refused until loaded" if fingerprint(training.state()) == after_all else "LOST: even after a load"


def judge_load(training: Training, moment: str, case: str, saved: dict[str, Any], after_all: str) -> str:
    """What became of a training in whose `load_state_dict` memory ran out."""
    untouched = reached(moment, case)
    untouched.optimizer.step()
    if fingerprint(training.state()) != fingerprint(untouched.state()):
        return "LOST: half loaded"
    training.load(saved)
    training.advance(MOMENTS[moment], MOMENTS[moment] + AFTER)
    return "nothing changed" if fingerprint(training.state()) == after_all else "LOST: goes on differently"


def is_unchanged(found: dict[str, Any], saved: dict[str, Any]) -> bool:
    """Whether parameters and state are as saved; networks may have been drawn for the first step, which took none."""
    if fingerprint(found) == fingerprint(saved):
        return True
    entries = found["optimizer"]["state"].values()
    is_fresh = all(int(entry["step"]) == 0 for entry in entries)
    return not saved["optimizer"]["state"] and is_fresh and fingerprint(found["model"]) == fingerprint(saved["model"])
