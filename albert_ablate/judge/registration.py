"""What a claims file said when its family was first looked at, so that whatever changed since is seen.

<runs>/claims/<family>.json holds every claim with its statement, a hash of what must not change, and how many of its
runs were there already: a claim whose pairs were there before it was registered is exploratory. A claim may still be
changed while no pair of it has been judged.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from albert_ablate.config import ConfigError, unwritable
from albert_ablate.judge.claims import ClaimsFile, ClaimText
from albert_ablate.records.checked import read_checked, write_checked


@dataclass(frozen=True)
class RunCounts:
    """Of a claim's runs those that are done already."""

    runs: int
    wanted: int
    pairs: int  # contrasts and seeds all of whose arms are done


Count = Callable[[ClaimText, str], RunCounts]
UNKNOWN = {"runs": None, "wanted": None, "pairs": None}  # registered by a version that did not count


def family_file(file: ClaimsFile, runs: Path) -> Path:
    """Where the registration of a file's family lies."""
    return runs / "claims" / f"{re.sub(r'[^A-Za-z0-9_-]+', '_', file.family)}.json"


def registered(file: ClaimsFile, runs: Path, form: str, count: Count) -> dict[str, Any]:
    """The family as it is registered from this look on; nothing is written.

    forms: that share the family's level. looked: those that have been judged. claims: by name the statement, whether it
    was added later, and by form hash, runs there, and whether a pair of it has been judged (seen).
    """
    place = family_file(file, runs)
    family = _read(place)
    if family is None:
        old = {
            (c.name, f): alone
            for c in file.claims
            for f in c.forms
            if (alone := _read(_older(c.name, f, runs))) is not None
        }
        forms = [f for f in file.forms if any(f == g for _, g in old)] or [*file.forms]
        family = {"version": 1, "family": file.family, "forms": forms, "looked": [], "claims": {}}
        for (name, f), alone in old.items():
            entry = family["claims"].setdefault(
                name, {"statement": alone.get("statement"), "later": False, "forms": {}}
            )
            entry["forms"][f] = {"hash": alone.get("hash"), **UNKNOWN, "seen": True}
        later = False
    else:
        later = True
    if form not in family["looked"]:
        family["looked"].append(form)
    for claim in file.claims:
        _register(file, claim, family["claims"], count, later)
    return family


def _register(file: ClaimsFile, claim: ClaimText, claims: dict[str, Any], count: Count, later: bool) -> None:
    """Add a claim that is not there; replace one that changed before a pair of it was judged."""
    entry = claims.get(claim.name)
    if entry is None:
        entry = claims[claim.name] = {"statement": claim.statement, "later": later, "forms": {}}
    changed = entry["statement"] != claim.statement
    if changed and not any(f["seen"] for f in entry["forms"].values()):
        entry["statement"] = claim.statement
    for form in claim.forms:
        known = entry["forms"].get(form)
        if known is None or not (known["seen"] or _is_hash(file, claim, form, known["hash"])):
            entry["forms"][form] = {"hash": file.hash(claim, form), **vars(count(claim, form)), "seen": False}


def _is_hash(file: ClaimsFile, claim: ClaimText, form: str, hash_: str) -> bool:
    """Whether a claim was registered as it is. That family.forms has been added since does not matter: how many tests
    share the level is registered by itself."""
    return hash_ in (file.hash(claim, form), file.hash(claim, form, named=False))


def status(file: ClaimsFile, claim: ClaimText, form: str, family: dict[str, Any]) -> tuple[str, bool]:
    """How a claim is registered, in words, and whether it was edited since."""
    entry = family["claims"][claim.name]
    registered_entry, hash_ = entry["forms"][form], file.hash(claim, form)
    names = {c.name for c in file.claims}
    before = [
        name for name, other in family["claims"].items()
        if name not in names and other["forms"].get(form, {}).get("hash") == hash_
    ]  # fmt: skip
    if before:
        return f"renamed since it was registered as {before[0]}", True
    edited = [
        what for what, same in (
            ("its statement", entry["statement"] == claim.statement),
            ("what it compares", _is_hash(file, claim, form, registered_entry["hash"])),
        ) if not same
    ]  # fmt: skip
    if edited:
        return f"edited since it was registered ({' and '.join(edited)})", True
    verb = "added later" if entry["later"] else "registered"
    if registered_entry["runs"] is None:
        return f"{verb} at its first judged pair, by a version that did not count runs", False
    if not registered_entry["runs"]:
        return f"{verb} before its runs", False
    exploratory = " (exploratory)" if registered_entry["pairs"] else ""
    return f"{verb} with {registered_entry['runs']} of {registered_entry['wanted']} runs there{exploratory}", False


def gone(file: ClaimsFile, family: dict[str, Any]) -> list[str]:
    """Claims that were registered and are no longer in the file, unless under another name."""
    names = {c.name for c in file.claims}
    hashes = {file.hash(c, f) for c in file.claims for f in c.forms}
    return [
        f"{name} was registered and is no longer in the file: {entry['statement']}"
        for name, entry in family["claims"].items()
        if name not in names and not any(f["hash"] in hashes for f in entry["forms"].values())
    ]


def is_seen(family: dict[str, Any], name: str, form: str) -> bool:
    """Whether a pair of the claim has been judged."""
    return bool(family["claims"].get(name, {}).get("forms", {}).get(form, {}).get("seen"))


def write(file: ClaimsFile, runs: Path, family: dict[str, Any]) -> None:
    """Write the registration of a family where it has changed. Raises ConfigError where it cannot be written."""
    place = family_file(file, runs)
    try:
        if _read(place) != family:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_checked(place, family, place.stem)
    except OSError as error:
        raise unwritable(place, error) from None


def _older(name: str, form: str, runs: Path) -> Path:
    """Where a version before this one registered a claim by itself."""
    return runs / "claims" / f"{name}.{form}.json"


def _read(place: Path) -> dict[str, Any] | None:
    try:
        content = read_checked(place, place.stem)
        for entry in content["claims"].values() if "claims" in content else ():
            (
                entry["statement"],
                entry["later"],
                [(f["hash"], f["runs"], f["pairs"], f["seen"]) for f in entry["forms"].values()],
            )
        return content if "claims" in content else {"hash": content["hash"], "statement": content.get("statement")}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{place} cannot be read ({error}).") from None
