"""Checkpoints that outlive what may happen to them: kills, full disks, flipped bits, code slipped in.

A checkpoint is a file as `torch.save` writes it, and a last line with the SHA-256 of all that stands before.
`torch.load` alone reads such a file too, but checks nothing: with a bit flipped on the disk it gives other numbers.
"""

import copy
import hashlib
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

MARK = b"\nsha256 "
SEAL = len(MARK) + 64 + 1  # bytes of the last line: the mark, the sum in hexadecimal, a line break


class Stateful(Protocol):
    """Models, optimizers, schedulers."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


Part = tuple[Stateful, Any]
"""An object and the state that is to be loaded into it."""


def save(path: Path, content: dict[str, Any]) -> None:
    """Replaces the checkpoint at `path` in one go. On return it has reached the disk."""

    def write(part: Path) -> None:
        with part.open("w+b") as file:
            torch.save(content, file)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.write(MARK + digest.encode() + b"\n")

    write_whole(path, write)


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `save` wrote. Nothing in the file is executed.

    Raises:
        ValueError: if the file cannot be read, or is not bit for bit what was written.
    """
    try:
        whole = path.read_bytes()
        data, seal = whole[:-SEAL], whole[-SEAL:]
        if seal != MARK + hashlib.sha256(data).hexdigest().encode() + b"\n":
            raise ValueError("its SHA-256 is missing or another one")
        content = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}")
    except Exception as error:  # a file that was made to do harm can raise anything
        raise ValueError(f"{path} is no checkpoint of this program, or damaged ({headline(error)})") from error
    return content


def load_together(path: Path, parts: Sequence[Part]) -> None:
    """Loads each state into its object: all of them or, if one does not fit, none.

    They are tried on copies first, since `Module.load_state_dict` copies what fits before it refuses what does not.

    Raises:
        ValueError: naming `path`, if one does not fit.
    """
    try:
        for target, state in parts:
            copy.deepcopy(target).load_state_dict(state)
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} does not fit this run ({headline(error)})") from error
    for target, state in parts:
        target.load_state_dict(state)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` make a file that replaces `path` in one go and has reached the disk on return.

    Whatever breaks it off leaves what was there. A kill may leave the part that was written too, which nothing reads;
    `remove_parts` takes it away.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # another process that writes here has a file of its own
    try:
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # or a crash of the machine could leave the new name on an empty file
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_parts(path: Path) -> None:
    """Removes what killed processes left of `path`. None that still writes there may be running."""
    for part in path.parent.glob(f"{path.name}.*.part"):
        part.unlink(missing_ok=True)


def headline(error: Exception) -> str:
    """The first line of an error that torch explains at length, or its name where it does not."""
    return next(iter(str(error).splitlines()), type(error).__name__)
