"""What run.json and started.json say, read where the run lies now.

Records hold absolute paths. Those of a folder that was moved, or that was written when paths were recorded as they
were typed, are read as the places that they mean beside the run.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from raygr.files import absolute, exists, fingerprint, is_relative, join, read_json, shipped

Roots = tuple[str, str]


def read_record(folder: str, file: str) -> dict[str, Any]:
    """A record whose inputs, and the fields of its configuration that name them, are where they are now."""
    folder = absolute(folder)
    record = read_json(join(folder, file))
    places = {path: found(path, roots(record, folder)) for path in record["inputs"]}
    inputs = {places[path]: digest for path, digest in record["inputs"].items()}
    return record | {"config": replaced(record["config"], places), "inputs": inputs}


def roots(record: Mapping[str, Any], folder: str) -> Roots:
    """What is before the common end of the output that is recorded and of the folder where the record lies."""
    before, now = record["config"].get("output", folder).rstrip("/").split("/"), folder.rstrip("/").split("/")
    while before and now and before[-1] == now[-1]:
        before.pop()
        now.pop()
    return "/".join(before), "/".join(now)


def moved(path: str, places: Roots) -> str:
    """`path` of a record as it is called now; `places` are the record's roots."""
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
    """A JSON value with its strings that are among `places` replaced."""
    match value:
        case dict():
            return {name: replaced(one, places) for name, one in value.items()}
        case list():
            return [replaced(one, places) for one in value]
        case str():
            return places.get(value, value)
    return value


def unlike(folder: str, file: str, settings: Mapping[str, Any], speed: frozenset[str]) -> str:
    """How a run of these settings (job, config) in the folder would differ from the one that left the record.

    Such as "with another configuration (epochs: 3 -> 4)"; "" where it would not, but for fields of `speed`.
    """
    record = read_record(folder, file)
    fields = changed_fields(record, settings, speed, roots(record, folder))
    if fields:
        return f"with another configuration ({fields})"
    stale = changed_inputs(record["inputs"])
    return f"from other content of {', '.join(stale)}" if stale else ""


def changed_fields(before: Mapping[str, Any], after: Mapping[str, Any], speed: frozenset[str], places: Roots) -> str:
    if before["job"] != after["job"]:
        return f"job: {before['job']} -> {after['job']}"
    old, new = settled(before["config"], speed), settled(after["config"], speed)
    names = [n for n in sorted(old.keys() | new.keys()) if not same(old.get(n), new.get(n), places)]
    return ", ".join(f"{n}: {old.get(n)} -> {new.get(n)}" for n in names)


def settled(config: Mapping[str, Any], speed: frozenset[str]) -> dict[str, Any]:
    """The fields, and keys of fields, that change results."""
    kept = {name: value for name, value in config.items() if name not in speed}
    for name, value in kept.items():
        if isinstance(value, dict):
            kept[name] = {key: one for key, one in value.items() if f"{name}.{key}" not in speed}
    return kept


def same(before: Any, after: Any, places: Roots) -> bool:
    """Whether two JSON values are equal, paths by the places that they mean."""
    match before, after:
        case str(), str():
            return before == after or absolute(after) in (absolute(before), moved(before, places), shipped(before))
        case list(), list():
            return len(before) == len(after) and all(same(*pair, places) for pair in zip(before, after, strict=True))
        case dict(), dict():
            return before.keys() == after.keys() and all(same(before[name], after[name], places) for name in before)
    return before == after


def changed_inputs(inputs: Mapping[str, str]) -> list[str]:
    """Of inputs with their fingerprints, those that have another content now, or are gone."""
    now = {path: fingerprint(path) for path in inputs}
    # a hub's model that this machine has not loaded yet is no other model
    unknown = [path for path in inputs if is_relative(path) and not (now[path] and inputs[path])]
    return [path for path in inputs if now[path] != inputs[path] and path not in unknown]


def strings(value: Any) -> Sequence[str]:
    """Those of a JSON value, without the names of fields."""
    match value:
        case dict():
            return [one for part in value.values() for one in strings(part)]
        case list():
            return [one for part in value for one in strings(part)]
    return [value] if isinstance(value, str) else []
