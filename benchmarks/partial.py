"""What an interrupted benchmark has measured: rows and the profile that they rest on, bound to what measured them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ditopt.errors import InputError
from ditopt.plan_text import write_text_atomically
from ditopt.profile import Profile
from ditopt.profile_file import fingerprint, load_profile, save_profile

Rows = list[dict[str, Any]]


class Partial:
    """Rows in the file ``path`` and their profile beside it, for a later run with the same ``facts``.

    Timings are in a profile, and differ from run to run: so a run that goes on has the profile of the one before.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path, self.facts = path, json.loads(json.dumps(facts))
        self.beside = path.with_name(f"{path.name}.profile")
        self.rests_on = ""

    def resume(self) -> tuple[Profile, Rows] | None:
        """What is there already; None if nothing is.

        Raises:
            InputError: it was measured by other code, with other arguments or on another model, or the profile beside
                it is missing or another one.
        """
        if not self.path.exists():
            return None
        ways_out = f"finish it as it was begun, or remove {self.path} to begin anew"
        try:
            found = json.loads(self.path.read_text())
            facts, profile, rows = (found[name] for name in ("facts", "profile", "rows"))
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{self.path}: does not tell what measured it; remove it to begin anew") from None
        apart = [
            f"{name} {facts.get(name)!r}, now {self.facts.get(name)!r}"
            for name in sorted({*facts, *self.facts})
            if facts.get(name) != self.facts.get(name)
        ]
        if apart:
            raise InputError(f"{self.path}: rows were measured with {'; '.join(apart)}: {ways_out}")
        if not self.beside.exists():
            raise InputError(f"{self.beside}: is missing, on which the rows in {self.path} rest: {ways_out}")
        kept = load_profile(self.beside)
        self.rests_on = fingerprint(kept)
        if self.rests_on != profile:
            raise InputError(f"{self.beside}: is not the profile on which the rows in {self.path} rest: {ways_out}")
        return kept, rows

    def begin(self, profile: Profile) -> None:
        """Keep the profile that all rows rest on."""
        save_profile(profile, self.beside)
        self.rests_on = fingerprint(load_profile(self.beside))

    def save(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep the rows so far, of a run that has begun or goes on."""
        found = {"facts": self.facts, "profile": self.rests_on, "rows": rows}
        write_text_atomically(self.path, json.dumps(found))

    def remove(self) -> None:
        """The benchmark is finished."""
        self.path.unlink(missing_ok=True)
        self.beside.unlink(missing_ok=True)
