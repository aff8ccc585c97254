"""A training process of `examples.train_classifier` is killed (SIGKILL) again and again, mostly while it saves.

It saves after every step. After each kill the next process must find a checkpoint that loads, that is at least as new
as the last save that had ended, and that is bit for bit what a run that nobody kills has at that step. At the end of
a chain of kills the result must be that run's.
"""

import functools
import multiprocessing
import os
import random
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.faults.training import fingerprint
from examples.image_data import digits
from examples.train_classifier import Run, Settings, train

KILLS_PER_CHAIN = 10
STEPS = 60
PATIENCE = 120.0  # seconds without a word after which something is wrong
AIMED = 0.8  # the share of the kills that wait for a save to begin
GOOD = ("went on as if nothing had been",)


class Watched(Run):
    """The example's run, telling what it does."""

    wire: Connection

    def save(self, path: Path) -> None:
        self.wire.send(("saving", self.step, ""))
        super().save(path)
        self.wire.send(("saved", self.step, ""))

    def advance(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        super().advance(images, labels)
        self.wire.send(("step", self.step, ""))

    def digest(self) -> str:
        return fingerprint([self.model.state_dict(), self.optimizer.state_dict(), self.losses])


def victim(path: Path, wire: Connection, steps: int, is_reference: bool) -> None:
    """The process: it goes on from the checkpoint, if there is one, and trains to the end.

    The reference tells what it has after every step.
    """
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own would outlive the process
    data = digits()
    settings = Settings("digits", (256,), 64, 0, "cpu", 3.0, 3e-3)  # checkpoints of 4 MB, so that saving takes its time
    run = Watched("lodo", data.train_images.shape[1], settings)
    run.wire = wire
    try:
        if path.exists():
            run.load(path)
    except ValueError as error:
        wire.send(("unreadable", 0, str(error)))
        return
    wire.send(("loaded", run.step, run.digest()))
    if is_reference:
        for step in range(1, steps + 1):
            train(run, data, step, path, checkpoint_every=steps)
            wire.send(("state", step, run.digest()))
    train(run, data, steps, path, checkpoint_every=1)
    wire.send(("end", run.step, run.digest()))


class Process:
    """A training process and what it said."""

    def __init__(self, path: Path, steps: int, is_reference: bool = False) -> None:
        os.environ["TQDM_DISABLE"] = "1"
        context = multiprocessing.get_context("forkserver")  # the processes start with these modules loaded
        context.set_forkserver_preload([__name__, "sklearn.datasets", "torch._dynamo"])
        self.wire, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=victim, args=(path, theirs, steps, is_reference))
        self.process.start()
        theirs.close()
        self.said: list[tuple[str, int, str]] = []

    def hear(self) -> tuple[str, int, str] | None:
        """The next word; None when the process has ended."""
        if not self.wire.poll(PATIENCE):
            self.process.kill()
            raise RuntimeError(f"the training process said nothing for {PATIENCE:g} seconds")
        try:
            word: tuple[str, int, str] = self.wire.recv()
        except EOFError:
            return None
        self.said.append(word)
        return word

    def hear_until(self, what: str, times: int = 1) -> bool:
        """Listens until it has said this so many times; False if it ended before."""
        while times > 0:
            word = self.hear()
            if word is None:
                return False
            times -= word[0] == what
        return True

    def kill(self) -> None:
        self.process.kill()
        while self.hear() is not None:
            pass
        self.process.join()

    def last(self, what: str) -> int:
        return max((step for word, step, _ in self.said if word == what), default=-1)


@functools.cache
def reference(steps: int) -> dict[int, str]:
    """The digest after every step of a run that nobody kills."""
    with tempfile.TemporaryDirectory() as folder:
        process = Process(Path(folder) / "lodo.pt", steps, is_reference=True)
        process.hear_until("end")
        process.kill()
        found = {step: digest for word, step, digest in process.said if word in ("loaded", "state")}
    if len(found) != steps + 1:
        raise RuntimeError(f"the run that nobody kills ended after {len(found) - 1} of {steps} steps")
    return found


def cases(kills: int) -> list[str]:
    return [f"chain {number}" for number in range(-(-kills // KILLS_PER_CHAIN))]


def run(name: str, seed: int, kills: int = KILLS_PER_CHAIN, steps: int = STEPS) -> dict[str, Any]:
    """One training of `steps` steps, killed `kills` times; what was found after each kill, and at the end."""
    chance = random.Random(f"{seed} {name}")
    expected = reference(steps)
    counts = {"kills": 0, "within a save": 0, "left a part of a file": 0}
    outcomes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lodo.pt"
        saved = 0
        while counts["kills"] < kills:
            parts = len(list(path.parent.glob("*.part")))
            process = Process(path, steps)
            if not wait(process, chance):
                process.kill()
                outcomes.append(found_by(process, saved, expected))
                break
            process.kill()
            outcomes.append(found_by(process, saved, expected))
            saved = max(saved, process.last("saved"))
            counts["kills"] += 1
            counts["within a save"] += process.last("saving") > process.last("saved")
            counts["left a part of a file"] += len(list(path.parent.glob("*.part"))) > parts
        last = Process(path, steps)
        last.hear_until("end")
        last.kill()
        outcomes.append(found_by(last, saved, expected))
        end = [digest for word, _, digest in last.said if word == "end"]
    # The first process had no checkpoint yet, so that what follows it is the first that a kill tells of.
    return {
        **counts,
        "outcomes": {outcome: outcomes[1:].count(outcome) for outcome in sorted(set(outcomes[1:]))},
        "the end is that of a run nobody killed": end == [expected[steps]],
    }


def wait(process: Process, chance: random.Random) -> bool:
    """Waits for the moment to kill the process; False if it ended before."""
    if chance.random() >= AIMED:
        heard = process.hear_until("loaded")
        time.sleep(chance.uniform(0.0, 0.2))
        return heard
    if not process.hear_until("saving", chance.randint(1, 3)):
        return False
    time.sleep(chance.choice((0.005, 0.01, 0.02, 0.04)) * chance.random())  # from the start of a save to beyond its end
    return True


def found_by(process: Process, saved: int, expected: dict[int, str]) -> str:
    """What a process found when it started, given the step of the last save that had ended."""
    for word, step, text in process.said:
        if word == "unreadable":
            return f"LOST: {text}"
        if word == "loaded":
            if step < saved:
                return "LOST: older than the last save"
            return GOOD[0] if text == expected[step] else "LOST: another state"
    return "LOST: the process ended before it had loaded"
