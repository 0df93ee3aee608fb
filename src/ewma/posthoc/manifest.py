"""The list of an archive's snapshots: what there is of which run, replaced whole or not at all."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ewma import files, profiles
from ewma.posthoc.step_weights import Snapshot
from ewma.profiles import Profile
from ewma.readers import Checkpoint, beside, open_checkpoint
from ewma.tracks import Track

NAME = "manifest.json"


@dataclass(frozen=True)
class Entry:
    """One snapshot of one track.

    `late` holds the time and count of tensors that go by their own clock, having come late in the run.
    """

    file: str
    track: str
    profile: str
    time: float
    count: int
    late: dict[str, tuple[float, int]]

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Entry:
        """What stands in the manifest."""
        late = {name: (float(time), int(count)) for name, (time, count) in told["late"].items()}
        file, track, profile = (str(told[name]) for name in ("file", "track", "profile"))
        return cls(file, track, profile, float(told["time"]), int(told["count"]), late)

    def snapshot(self, tensor: str | None = None) -> Snapshot:
        time, count = self.late.get(tensor or "", (self.time, self.count))
        return Snapshot(profiles.from_json(self.profile), time, count)


@dataclass(frozen=True)
class Manifest:
    """What an archive's folder lists: snapshots of one run, oldest first."""

    folder: Path
    run: str | None = None
    entries: list[Entry] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        path = folder / NAME
        if not path.is_file():
            return cls(folder)
        try:
            told = json.loads(path.read_text())
            if isinstance(told, dict) and "format" in told:
                files.check_format(str(path), told, "Archive")
            entries = [Entry.read(each) for each in told["snapshots"]]
            run: str = told["run"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: expected the list of an archive's snapshots; it is damaged "
                f"({type(error).__name__}: {error}). Copy it back, or take another folder."
            ) from error
        for entry in entries:
            beside(path, entry.file)
        return cls(folder, run, sorted(entries, key=lambda entry: entry.time))

    def check_run(self, run: str) -> None:
        """Refuse a folder that holds snapshots of another run."""
        found, where = self.run, NAME
        if found is None:
            for path in sorted(self.folder.glob("*.safetensors")):
                with open_checkpoint(path) as file:
                    other = told(file).get("run")
                if other != run:
                    found, where = str(other), path.name
                    break
        if found not in (None, run):
            raise ValueError(
                f"{self.folder / where}: it is of the run {found}, and these averages are of the run {run}; nothing "
                f"was written. To go on with that run, load its state into the ModelEMA (ema.load_state_dict); for a "
                f"new run take an empty folder."
            )

    def check_profile(self, name: str, profile: Profile) -> None:
        """Refuse a track that was archived with another profile so far."""
        for entry in self.entries:
            if entry.track == name and entry.profile != profile.to_json():
                raise ValueError(
                    f"{self.folder}: the snapshots of {name!r} so far are of {entry.snapshot().profile!r}; it is now "
                    f"{profile!r}. Nothing was written. Take another folder, or another name for the profile."
                )

    def new_entry(self, name: str, track: Track) -> Entry:
        """The entry of a track as it is now, in a file that is not there yet."""
        clock = track.clock
        stem = f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}-{int(clock.count):09d}"
        file, again = f"{stem}.safetensors", 1
        while (self.folder / file).exists():
            again += 1
            file = f"{stem}-{again}.safetensors"
        late = {tensor: (float(own.time), int(own.count)) for tensor, own in track.clocks.items()}
        return Entry(file, name, track.profile.to_json(), float(clock.time), int(clock.count), late)

    def replace(self, run: str, added: Sequence[Entry]) -> None:
        """List new snapshots, and no longer those that lie after them: the run was resumed from before these."""
        now, tracks = added[0].time, {entry.track for entry in added}
        stale = [e for e in self.entries if e.time > now or (e.time == now and e.track in tracks)]
        kept = [asdict(entry) for entry in (*(e for e in self.entries if e not in stale), *added)]
        listed: dict[str, Any] = {"format": files.FORMAT, "kind": "Archive", "run": run, "snapshots": kept}
        files.write_text(self.folder / NAME, json.dumps(listed, indent=1) + "\n")
        for entry in stale:
            with contextlib.suppress(OSError):
                (self.folder / entry.file).unlink()

    def open(self, entry: Entry) -> Checkpoint:
        """The file of a snapshot, if it is the one that is listed."""
        path = self.folder / entry.file
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: the snapshot of {entry.track!r} at {entry.time:g} is missing; {NAME} lists it. Copy it back, "
                f"or take it out of the list."
            )
        file = open_checkpoint(path)
        found = told(file)
        if found.get("run") != self.run:
            raise ValueError(f"{path}: it is of the run {found.get('run')}, and {NAME} of the run {self.run}")
        for part in ("track", "profile", "time", "count"):
            if found[part] != getattr(entry, part):
                raise ValueError(f"{path}: {part} is {found[part]!r} in it, and {getattr(entry, part)!r} in {NAME}")
        return file


def told(file: Checkpoint) -> dict[str, Any]:
    """What the head of a snapshot's file says of it."""
    found: dict[str, Any] = json.loads(file.others().get("ewma", "{}"))
    return found
