"""Checkpoints of a run: after every round the whole state, on disk before the next round begins.

A checkpoint is a small manifest that names its parts. A part is a file named after the SHA-256 of its content (safetensors or JSON,
never a pickle), so what has not changed is not written again, and what was torn or tampered with is recognised. A part that two
checkpoints share has a copy beside it: no damaged file voids both. Only its owner can read a part: the server's secret and what
clients remember are among them. The rows of finished rounds are no part: a manifest says how far the journal went.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hetfl.errors import FOREIGN, RunError
from hetfl.files import reason, sync_folder, write_file
from hetfl.models.state import State, pack_tensors, unpack_tensors
from hetfl.runs.journal import Journal, Mark, Round

SUFFIX = {"tensors": ".safetensors", "facts": ".json"}


@dataclass(eq=False)
class Snapshot:
    """A run after `round` rounds: named groups of tensors, and facts that JSON can say. Of one that was loaded also the `rounds`,
    which can be gone through any number of times, and the `mark` of the journal that they are in."""

    round: int
    tensors: dict[str, State] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    mark: Mark = field(default_factory=Mark)
    rounds: Iterable[Round] = ()


@dataclass(frozen=True)
class Rounds:
    """The rounds of a journal as far as `mark`, read from the disk each time that they are gone through."""

    journal: Journal
    mark: Mark

    def __iter__(self) -> Iterator[Round]:
        return self.journal.read(self.mark)


class BrokenError(Exception):
    """A checkpoint that is not what was written."""


class Checkpoints:
    """The checkpoints in `folder`, of which the last `keep` stay."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self._folder, self._objects, self._copies, self._keep = folder, folder / "objects", folder / "copies", keep
        self._known: dict[str, tuple[Any, tuple[int, ...], str]] = {}  # group -> what it held, its versions, its file
        self._fresh: set[str] = set()  # files that only the checkpoint under way has
        self.journal = Journal(folder)
        self.mended: list[str] = []  # parts that were damaged and are so no more

    def begin(self, moment: Snapshot | None) -> None:
        """Goes on from `moment`, or from nothing: what is of later rounds is removed. Raises RunError where it cannot be."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._manifests():
                if moment is None or path.name > manifest_name(moment.round):
                    path.unlink()
            self.journal.cut(moment.mark if moment else Mark())
        except OSError as error:
            raise RunError(f"'{self._folder}' cannot be written: {reason(error)}") from error

    def save(self, moment: Snapshot, rounds: Sequence[Round] = ()) -> None:
        """Writes a checkpoint whole or not at all; `rounds` are those since the one before. Raises RunError where the disk is full;
        what was written before stays."""
        self._fresh.clear()
        try:
            self._objects.mkdir(parents=True, exist_ok=True)
            self._copies.mkdir(exist_ok=True)
            mark = self.journal.add(rounds)
            body = {
                "round": moment.round,
                "journal": {"bytes": mark.length, "sha256": mark.sha256},
                "tensors": {name: self._tensors(name, group) for name, group in moment.tensors.items()},
                "facts": {name: self._put(text(fact), "facts") for name, fact in moment.facts.items()},
            }
            for part in parts(body):
                self._copy_shared(part)
            for folder in (self._objects, self._copies):
                sync_folder(folder)
            write_file(self._folder / manifest_name(moment.round), text({"body": body, "sha256": digest(text(body))}))
        except OSError as error:
            raise RunError(
                f"the checkpoint of round {moment.round} cannot be written to '{self._folder}': {reason(error)}; "
                "the one before is intact: make room and go on with hfl resume"
            ) from error
        self._known = {name: known for name, known in self._known.items() if name in moment.tensors}
        self._tidy()

    def _tensors(self, name: str, group: State) -> str:
        """The file of a group; one that holds the very tensors of last time is not looked at again."""
        held, versions = tuple(group.values()), tuple(-1 if t.is_inference() else t._version for t in group.values())
        before = self._known.get(name)
        alike = before and versions == before[1] and len(held) == len(before[0])
        if not (before and alike and all(a is b for a, b in zip(held, before[0], strict=True))):
            self._known[name] = held, versions, self._put(pack_tensors(group), "tensors")
        return self._known[name][2]

    def _put(self, data: bytes, kind: str) -> str:
        name = digest(data)
        if not (path := self._objects / (name + SUFFIX[kind])).exists():
            write_file(path, data, named=False, private=True)
            self._fresh.add(path.name)
        return name

    def _copy_shared(self, part: str) -> None:
        """Copies a part that was there before this checkpoint, once."""
        if part not in self._fresh and not (copy := self._copies / part).exists():
            data = (self._objects / part).read_bytes()
            if digest(data) == copy.stem:
                write_file(copy, data, named=False, private=True)

    def _tidy(self) -> None:
        """Removes what only older checkpoints need."""
        kept = self._manifests()[-self._keep :]
        for path in self._manifests()[: -self._keep]:
            path.unlink(missing_ok=True)
        needed = {part for path in kept for part in named_parts(path)}
        for path in [*self._objects.iterdir(), *self._copies.iterdir()]:
            if path.name not in needed:
                path.unlink(missing_ok=True)

    def _manifests(self) -> list[Path]:
        return find_manifests(self._folder)

    def load(self, note: Callable[[str], None]) -> Snapshot | None:
        """The newest checkpoint that is whole; `note` hears of those that are not. None where there is none."""
        for path in reversed(self._manifests()):
            try:
                found = self._read(path)
                if self.mended:
                    note(f"the checkpoint '{path.name}' had {len(self.mended)} damaged parts, which their copies have mended")
                for name, fault in self.journal.faults(found.mark).items():
                    note(f"'{name}', the rows of finished rounds, {fault}; the other copy of them is whole")
                return found
            except BrokenError as error:
                note(f"the checkpoint '{path.name}' is damaged ({error}); going back to the one before")
        return None

    def check(self) -> Iterator[tuple[str, str]]:
        """Every checkpoint by its name, the newest first, with what is wrong with it; "" where nothing is."""
        for path in reversed(self._manifests()):
            try:
                self._read(path)
                yield path.name, ""
            except BrokenError as error:
                yield path.name, str(error)

    def _read(self, path: Path) -> Snapshot:
        body = manifest(path)
        try:
            tensors = {name: unpack_tensors(self._get(file, "tensors")) for name, file in body["tensors"].items()}
            facts = {name: json.loads(self._get(file, "facts")) for name, file in body["facts"].items()}
            mark = Mark(int(body["journal"]["bytes"]), str(body["journal"]["sha256"]))
            round = int(body["round"])
        except (*FOREIGN, SafetensorError) as error:
            raise BrokenError("it is not one of this version of hetfl") from error
        if self.journal.find(mark) is None:
            raise BrokenError("neither copy of the rows of its rounds is what was written")
        return Snapshot(round, tensors, facts, mark, Rounds(self.journal, mark))

    def _get(self, name: str, kind: str) -> bytes:
        """A part, from its copy where it is damaged itself: it is then mended."""
        part, why = name + SUFFIX[kind], "a part is missing"
        for place in (self._objects / part, self._copies / part):
            try:
                data = place.read_bytes()
            except OSError:
                continue
            if digest(data) == name:
                if place.parent == self._copies:
                    write_file(self._objects / part, data, private=True)
                    self.mended.append(part)
                return data
            why = "a part is not what was written"
        raise BrokenError(why)


def manifest_name(round: int) -> str:
    """The file of the checkpoint after `round` rounds."""
    return f"round-{round:06d}.json"


def find_manifests(folder: Path) -> list[Path]:
    """The manifests of the checkpoints in a folder, the oldest first."""
    return sorted(folder.glob("round-*.json"))


def count_rounds(folder: Path) -> int:
    """The rounds before the newest checkpoint in a folder, by its name; 0 where there is none."""
    return int(found[-1].stem.removeprefix("round-")) if (found := find_manifests(folder)) else 0


def manifest(path: Path) -> dict[str, Any]:
    """The body of a checkpoint's manifest. Raises BrokenError where it is not what was written."""
    try:
        whole = json.loads(path.read_bytes())
        body: dict[str, Any] = whole["body"]
        if whole["sha256"] == digest(text(body)):
            return body
    except (OSError, *FOREIGN) as error:
        raise BrokenError("its list of parts cannot be read") from error
    raise BrokenError("its list of parts is not what was written")


def parts(body: dict[str, Any]) -> set[str]:
    """The names of the files of a checkpoint's parts."""
    return {file + SUFFIX[kind] for kind in SUFFIX for file in body[kind].values()}


def named_parts(path: Path) -> set[str]:
    """The files that a checkpoint needs; none where it is damaged."""
    try:
        return parts(manifest(path))
    except (BrokenError, *FOREIGN):
        return set()


def text(value: Any) -> bytes:
    return json.dumps(value).encode()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
