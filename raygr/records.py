"""Read run.json and started.json, and compare them with a run that is to be made.

Records hold absolute paths. The paths of a folder that was moved, or of an old record with relative paths, are read as
the places beside the run that they stand for.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from raygr.files import absolute, exists, fingerprint, is_relative, join, read_json, shipped

Roots = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The content of run.json; started.json holds the first three fields."""

    job: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    """Path -> fingerprint of what the run reads."""
    packages: Mapping[str, str] = dataclasses.field(default_factory=dict)
    git_commit: str = ""
    started: float = 0.0
    """Seconds since 1970."""
    seconds: float = 0.0
    counts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Rows in and out by reason, and whatever else the stage counts."""

    @property
    def output_of(self) -> str:
        """The stage whose output the run holds: a vectors run with a readout holds that of a score run."""
        return output_of(self.job, self.config.get("readout"))


def output_of(job: str, readout: str | None) -> str:
    """The stage whose output a run of `job` holds; `readout` is the setting of a vectors run."""
    return "score" if job == "vectors" and readout else job


def read_record(folder: str, file: str) -> RunRecord:
    """Return a record with the places where its inputs are now, in `inputs` and in `config`."""
    folder = absolute(folder)
    record = RunRecord(**read_json(join(folder, file)))
    places = {path: found(path, roots(record, folder)) for path in record.inputs}
    inputs = {places[path]: digest for path, digest in record.inputs.items()}
    return dataclasses.replace(record, config=replaced(record.config, places), inputs=inputs)


def roots(record: RunRecord, folder: str) -> Roots:
    """Return what precedes the common end of the recorded output and of the folder where the record lies."""
    before, now = record.config.get("output", folder).rstrip("/").split("/"), folder.rstrip("/").split("/")
    while before and now and before[-1] == now[-1]:
        before.pop()
        now.pop()
    return "/".join(before), "/".join(now)


def moved(path: str, places: Roots) -> str:
    """Return the name that `path` of a record has now; `places` are the record's roots."""
    before, now = places
    if before == now:
        return path
    if not before:  # it was recorded as it was typed, beside the relative path of the output
        return join(now, path) if is_relative(path) else path
    is_below = f"{path}/".startswith(f"{before}/")
    return now + path[len(before) :] if is_below else path


def found(path: str, places: Roots) -> str:
    return next((one for one in (moved(path, places), path, shipped(path)) if exists(one)), path)


def replaced(value: Any, places: Mapping[str, str]) -> Any:
    """Return a JSON value in which the strings that are keys of `places` are replaced."""
    match value:
        case dict():
            return {name: replaced(one, places) for name, one in value.items()}
        case list():
            return [replaced(one, places) for one in value]
        case str():
            return places.get(value, value)
    return value


def unlike(folder: str, file: str, job: str, config: Mapping[str, Any], speed: frozenset[str]) -> str:
    """Say how a run of this job and configuration would differ from the recorded one.

    Such as "with another configuration (epochs: 3 -> 4)"; "" where it would differ in fields of `speed` at most.
    """
    record = read_record(folder, file)
    if record.job != job:
        return f"with another configuration (job: {record.job} -> {job})"
    old, new, places = settled(record.config, speed), settled(config, speed), roots(record, folder)
    names = [n for n in sorted(old.keys() | new.keys()) if not same(old.get(n), new.get(n), places)]
    if names:
        fields = ", ".join(f"{n}: {old.get(n)} -> {new.get(n)}" for n in names)
        return f"with another configuration ({fields})"
    stale = changed_inputs(record.inputs)
    return f"from other content of {', '.join(stale)}" if stale else ""


def settled(config: Mapping[str, Any], speed: frozenset[str]) -> dict[str, Any]:
    """Return the fields, and the keys of fields, that change results."""
    kept = {name: value for name, value in config.items() if name not in speed}
    for name, value in kept.items():
        if isinstance(value, dict):
            kept[name] = {key: one for key, one in value.items() if f"{name}.{key}" not in speed}
    return kept


def same(before: Any, after: Any, places: Roots) -> bool:
    """Return whether two JSON values are equal; two paths are where they stand for the same place."""
    match before, after:
        case str(), str():
            return before == after or absolute(after) in (absolute(before), moved(before, places), shipped(before))
        case list(), list():
            return len(before) == len(after) and all(same(*pair, places) for pair in zip(before, after, strict=True))
        case dict(), dict():
            return before.keys() == after.keys() and all(same(before[name], after[name], places) for name in before)
    return before == after


def changed_inputs(inputs: Mapping[str, str]) -> list[str]:
    """Return the inputs that have another content now than their fingerprint says, or are gone."""
    now = {path: fingerprint(path) for path in inputs}
    # a model of the hub that this machine has not downloaded yet counts as unchanged
    unknown = [path for path in inputs if is_relative(path) and not (now[path] and inputs[path])]
    return [path for path in inputs if now[path] != inputs[path] and path not in unknown]


def strings(value: Any) -> Sequence[str]:
    """Return all strings of a JSON value; the keys of objects are not among them."""
    match value:
        case dict():
            return [one for part in value.values() for one in strings(part)]
        case list():
            return [one for part in value for one in strings(part)]
    return [value] if isinstance(value, str) else []
