"""Checkpoints are damaged, or tampered with and sealed again, and then loaded.

Each must end in a ValueError with nothing changed, or load exactly what was saved. What is merely damaged is also read
by `torch.load` and `load_state_dict` alone, to see what they would let through.
"""

import copy
import functools
import hashlib
import io
import pickle
import random
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.faults.training import Training, fingerprint
from examples import checkpoints

CASE = "default network"
STEPS = 3
GOOD = ("refused, nothing changed", "loaded as saved")


@functools.cache
def reference() -> tuple[bytes, dict[str, Any], str]:
    """A checkpoint: its bytes, its content and the content's fingerprint."""
    training = Training(CASE)
    training.advance(0, STEPS)
    content = training.state()
    return sealed(content), content, fingerprint(content)


def sealed(content: dict[str, Any]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        checkpoints.save(path, content)
        return path.read_bytes()


# ---- damage: bytes to bytes ------------------------------------------------------------------------------------------


def truncated(whole: bytes, chance: random.Random) -> bytes:
    return whole[: chance.randrange(len(whole))]


def overwritten(whole: bytes, chance: random.Random) -> bytes:
    """1 to 64 random bytes at random places or in a row."""
    count, found = chance.randint(1, 64), bytearray(whole)
    begin = chance.randrange(len(whole) - count)
    places = range(begin, begin + count) if chance.random() < 0.5 else chance.sample(range(len(whole)), count)
    for place in places:
        found[place] = chance.randrange(256)
    return bytes(found)


def flipped(whole: bytes, chance: random.Random) -> bytes:
    """One bit within the numbers of a tensor."""
    _, begin, length = chance.choice(records(whole))
    found = bytearray(whole)
    found[begin + chance.randrange(length)] ^= 1 << chance.randrange(8)
    return bytes(found)


def zeroed(whole: bytes, chance: random.Random) -> bytes:
    """A stretch of zeros, as a disk leaves it where a write did not come through."""
    length = chance.choice((1, 16, 512, 4096))
    begin = chance.randrange(max(1, len(whole) - length)) // length * length
    return whole[:begin] + bytes(len(whole[begin : begin + length])) + whole[begin + length :]


def exchanged(whole: bytes, chance: random.Random) -> bytes:
    """The numbers of two tensors of the same size, one in the other's place."""
    places = records(whole)
    pairs = [(a, b) for i, a in enumerate(places) for b in places[:i] if a[2] == b[2]]
    (_, a, length), (_, b, _) = chance.choice(pairs)
    found = bytearray(whole)
    found[a : a + length], found[b : b + length] = found[b : b + length], found[a : a + length]
    return bytes(found)


def saved_anew(whole: bytes, chance: random.Random) -> bytes:
    """Other numbers, written by torch.save with all that belongs to it, but for the seal."""
    content = copy.deepcopy(reference()[1])
    tensors_of(content)[chance.randrange(4)].mul_(1 + chance.random())
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue() + whole[-checkpoints.SEAL :]


def records(whole: bytes) -> list[tuple[str, int, int]]:
    """Name, place and length of the tensors' records in the file."""
    with zipfile.ZipFile(io.BytesIO(whole[: -checkpoints.SEAL])) as archive:
        found = [info for info in archive.infolist() if "/data/" in info.filename]
    headers = [whole[info.header_offset : info.header_offset + 30] for info in found]
    starts = [30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little") for head in headers]
    return [
        (info.filename, info.header_offset + start, info.file_size) for info, start in zip(found, starts, strict=True)
    ]


def tensors_of(content: dict[str, Any]) -> list[Tensor]:
    return [*content["model"].values(), *(entry["momentum"] for entry in content["optimizer"]["state"].values())]


# ---- tampering: content to content, then sealed ----------------------------------------------------------------------


class Attack:
    """Code in a pickle: unpickling it would make the folder `path`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, (self.path,)


def some_tensor(content: dict[str, Any], chance: random.Random) -> tuple[dict[str, Any], str]:
    """A place with a tensor: of the model, or of the optimizer's state."""
    holders = [content["model"], *content["optimizer"]["state"].values()]
    places = [(holder, name) for holder in holders for name, value in holder.items() if isinstance(value, Tensor)]
    return chance.choice(places)


def network(content: dict[str, Any]) -> dict[str, Any]:
    return content["optimizer"]["state"][0]


def wrong_shape(content: dict[str, Any], chance: random.Random) -> None:
    holder, name = some_tensor(content, chance)
    value = holder[name]
    holder[name] = chance.choice(
        [value.new_ones(value.numel() + 1), value.unsqueeze(0), value.new_ones(*value.shape, 2), value.new_ones(2, 0)]
    )


def wrong_dtype(content: dict[str, Any], chance: random.Random) -> None:
    state = content["optimizer"]["state"]
    holder = state[chance.choice(list(state))]
    name = chance.choice([name for name, value in holder.items() if isinstance(value, Tensor)])
    holder[name] = holder[name].to(chance.choice([torch.float16, torch.complex64, torch.int16, torch.bool]))


def not_finite(content: dict[str, Any], chance: random.Random) -> None:
    state = content["optimizer"]["state"]
    holder = state[chance.choice(list(state))]
    names = [name for name, value in holder.items() if isinstance(value, Tensor) and value.is_floating_point()]
    value = holder[chance.choice(names)].view(-1)
    value[chance.randrange(len(value))] = chance.choice([float("nan"), float("inf"), -float("inf")])


def impossible_number(content: dict[str, Any], chance: random.Random) -> None:
    entry = chance.choice(list(content["optimizer"]["state"].values()))
    numbers = [("theta_exp_avg_sq", -1e-20), ("meta_step", -1), ("step", -3), ("skipped_steps", -1)]
    name, value = chance.choice([(name, value) for name, value in numbers if name in entry])
    entry[name].view(-1)[chance.randrange(entry[name].numel())] = value


def no_permutation(content: dict[str, Any], chance: random.Random) -> None:
    rows = network(content)["permutations"]
    row = rows[chance.randrange(len(rows))]
    place, other = chance.sample(range(len(row)), 2)
    row[place] = chance.choice([int(row[other]), len(row), -1, 2**31 - 1])


def not_a_tensor(content: dict[str, Any], chance: random.Random) -> None:
    holder, name = some_tensor(content, chance)
    holder[name] = chance.choice([None, 1.0, "theta", [1.0, 2.0], {"a": 1}])


def missing_or_unknown(content: dict[str, Any], chance: random.Random) -> None:
    holder, name = some_tensor(content, chance)
    if chance.random() < 0.5:
        del holder[name]
    else:
        holder[f"{name}_2"] = holder.pop(name) if chance.random() < 0.5 else holder[name].clone()


def wrong_option(content: dict[str, Any], chance: random.Random) -> None:
    options = content["optimizer"]["param_groups"][0]
    name, value = chance.choice(
        [
            ("depth", 10**18),
            ("depth", 3),
            ("depth", "deep"),
            ("depth", -1),
            ("block_size", 2**62),
            ("block_size", None),
            ("expansion", 1e308),
            ("expansion", float("nan")),
            ("lr", "fast"),
            ("lr", -1.0),
            ("lr", torch.ones(2)),
            ("beta", 1.5),
            ("meta_lr", None),
            ("preconditioner", "diagonal"),
            ("preconditioner", ["scalar"]),
            ("permutation", "shuffle"),
            ("meta_optimizer", {}),
            ("meta_every", 0),
            ("maximize", "no"),
            ("params", None),
            ("params", [0, 0, 1, 2]),
            ("params", [0, 1]),
            ("params", [[0], 1, 2, 3]),
        ]
    )
    options[name] = value


def wrong_layout(content: dict[str, Any], chance: random.Random) -> None:
    optimizer = content["optimizer"]
    kind = chance.randrange(9)
    if kind < 3:
        network(content)["shards"] = (True, 1.0, "1")[kind]
    elif kind == 3:
        network(content)["shards"] = torch.tensor([1, 1, 1])
    elif kind == 4:
        optimizer["state"] = list(optimizer["state"].values())
    elif kind == 5:
        optimizer["param_groups"] = optimizer["param_groups"] * 2
    elif kind == 6:
        optimizer["state"][0] = [1, 2]
    elif kind == 7:
        content["optimizer"] = None
    else:
        optimizer["param_groups"] = {"params": [0, 1, 2, 3]}


Damage = Callable[[bytes, random.Random], bytes]
Tampering = Callable[[dict[str, Any], random.Random], None]
DAMAGE: dict[str, Damage] = {
    "truncated": truncated,
    "random bytes": overwritten,
    "a bit of a tensor flipped": flipped,
    "zeros": zeroed,
    "two tensors exchanged": exchanged,
    "saved anew without a seal": saved_anew,
}
TAMPERING: dict[str, Tampering] = {
    "sealed: wrong shape": wrong_shape,
    "sealed: wrong dtype": wrong_dtype,
    "sealed: NaN or infinity": not_finite,
    "sealed: impossible number": impossible_number,
    "sealed: no permutation": no_permutation,
    "sealed: no tensor": not_a_tensor,
    "sealed: entry missing or unknown": missing_or_unknown,
    "sealed: wrong option": wrong_option,
    "sealed: wrong layout": wrong_layout,
}
CODE = "sealed: code in the pickle"


def cases(each: int) -> list[str]:
    return [f"{kind}; {number}" for kind in (*DAMAGE, *TAMPERING, CODE) for number in range(each)]


def run(name: str, seed: int) -> dict[str, Any]:
    """Makes one bad checkpoint, loads it, and says what happened."""
    kind = name.split("; ")[0]
    chance = random.Random(f"{seed} {name}")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of pickles that it would not have written
        path, marker = Path(folder) / "checkpoint", Path(folder) / "executed"
        path.write_bytes(bad_file(kind, chance, marker))
        record: dict[str, Any] = outcome(path)
        if marker.exists():
            record["outcome"] = "LOST: code was executed"
        if kind in DAMAGE:
            record["torch alone"] = outcome_of_torch_alone(path)
    return record


def bad_file(kind: str, chance: random.Random, marker: Path) -> bytes:
    whole, content, _ = reference()
    if kind in DAMAGE:
        while (found := DAMAGE[kind](whole, chance)) == whole:
            pass
        return found
    content = copy.deepcopy(content)
    if kind in TAMPERING:
        TAMPERING[kind](content, chance)
        return sealed(content)
    chance.choice([content, content["model"], content["optimizer"], network(content)])["extra"] = Attack(str(marker))
    if chance.random() < 0.5:
        return sealed(content)
    bare = pickle.dumps(content)  # as the oldest torch wrote
    return bare + checkpoints.MARK + hashlib.sha256(bare).hexdigest().encode() + b"\n"


def outcome(path: Path) -> dict[str, Any]:
    """Loads a checkpoint as the examples do, into a training that stands elsewhere."""
    training = Training(CASE)
    training.advance(100, 102)
    before = fingerprint(training.state())
    try:
        content = checkpoints.load(path)
        checkpoints.load_together(
            path, [(training.model, content.get("model")), (training.optimizer, content.get("optimizer"))]
        )
    except ValueError as error:
        is_unchanged = fingerprint(training.state()) == before
        return {"outcome": GOOD[0] if is_unchanged else "LOST: refused, but changed", "error": headline(error)}
    except BaseException as error:
        return {"outcome": f"LOST: {type(error).__name__}", "error": headline(error)}
    is_same = fingerprint(training.state()) == reference()[2]
    return {"outcome": GOOD[1] if is_same else "LOST: loaded something else"}


def outcome_of_torch_alone(path: Path) -> str:
    training = Training(CASE)
    try:
        content = torch.load(path, weights_only=True)
        training.model.load_state_dict(content["model"])
        training.optimizer.load_state_dict(content["optimizer"])
    except Exception:
        return "refused"
    return "loaded as saved" if fingerprint(training.state()) == reference()[2] else "loaded something else"


def headline(error: BaseException) -> str:
    text = str(error).split("damaged ")[-1].split("does not fit this run ")[-1]
    return next(iter(text.splitlines()), "")[:160]
