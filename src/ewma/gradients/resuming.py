"""What a saved state must be before anything of it is taken over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ewma import files, profiles
from ewma.profiles import Profile


def check(
    what: str, state: Mapping[str, Any], kind: str, mine: Profile, called: str, needs: Sequence[str] = ()
) -> None:
    """Refuse a state of another class, of a newer version, that lacks a part, or saved with another profile.

    Args:
        what, called: who asks, and what it is called in the error.
    """
    files.check_format(what, state, kind, ("profile", *needs))
    saved = profiles.from_json(state["profile"])
    if saved != mine:
        raise ValueError(
            f"{what}: saved with {saved!r}, but this {called} has {mine!r}. Nothing was loaded. Make it with the saved "
            f"profile to go on."
        )
