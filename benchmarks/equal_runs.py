"""Compares two folders of runs file by file: a change of the code that must not change any result.

    raygr pipeline --config benchmarks/golden.yaml        in a checkout before the change, and in one after it
    python benchmarks/equal_runs.py BEFORE/outputs/golden AFTER/outputs/golden

Tables, weights and figures must be equal; JSON and text must be equal apart from seconds, times, paths, versions and
hashes of inputs. Prints what differs; the exit code is 1 where anything does.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from safetensors.numpy import load_file

# Of a run's record: what names the code, the machine and the moment, and not the result.
CHANGING = re.compile(
    r"seconds|started|finished|time|versions|packages|commit|sha256|inputs|hash|fingerprint|config|output|path|per_s"
    r"|^(data|adapter|target_modules)$"  # hashes of inputs, paths, and PEFT's set of names in any order
)
NUMBER = re.compile(r"\d+(\.\d+)? ?(s|ms|GB|MB|MiB)\b|/[\w./-]+|\b[0-9a-f]{12,}\b|\d{4}-\d\d-\d\d")
SKIPPED = {"run.json", "started.json"}  # compared by their counts alone
IGNORED = re.compile(
    r"checkpoint|/prompts/[^/]*parquet|tfevents|\.lock|/ray/|/store/|/tune/|trials/.*/(events|started)"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parsed = parser.parse_args()
    before, after = files_of(parsed.before), files_of(parsed.after)
    found = [f"only before: {name}" for name in sorted(before - after)]
    found += [f"only after: {name}" for name in sorted(after - before)]
    for name in sorted(before & after):
        found += [f"{name}: {one}" for one in differences(parsed.before / name, parsed.after / name)]
    print("\n".join(found) or f"{len(before & after)} files are equal")
    return 1 if found else 0


def files_of(folder: Path) -> set[str]:
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if not IGNORED.search(f"/{name}")}


def differences(before: Path, after: Path) -> Iterator[str]:
    match before.suffix:
        case ".parquet":
            one, other = pq.read_table(before), pq.read_table(after)
            drop = [name for name in one.column_names if CHANGING.search(name)]
            if "subject_id" in one.column_names:  # score rows come in the order in which their blocks were written
                one, other = one.sort_by("subject_id"), other.sort_by("subject_id")
            # as text, in which NaN equals NaN
            if repr(one.drop_columns(drop).to_pylist()) != repr(other.drop_columns(drop).to_pylist()):
                yield "tables differ"
        case ".safetensors":
            one, other = load_file(before), load_file(after)
            yield from (f"{key} differs" for key in one.keys() | other.keys() if not same_array(one, other, key))
        case ".json" if before.name in SKIPPED:
            one, other = (json.loads(path.read_text()).get("counts") for path in (before, after))
            yield from unlike_json("counts", one, other)
        case ".json":
            yield from unlike_json("", json.loads(before.read_text()), json.loads(after.read_text()))
        case ".jsonl":
            lines = [[json.loads(line) for line in path.read_text().splitlines()] for path in (before, after)]
            yield from unlike_json("", *lines)
        case ".md" | ".csv" | ".tex" | ".txt" | ".html" | ".svg":
            one, other = (NUMBER.sub("", path.read_text()).splitlines() for path in (before, after))
            changed = [(a, b) for a, b in zip(one, other, strict=False) if a != b]
            if changed or len(one) != len(other):
                a, b = changed[0] if changed else (f"{len(one)} lines", f"{len(other)} lines")
                yield f"{len(changed)} lines differ, the first: {a[:200]!r} and {b[:200]!r}"
        case _:
            if before.read_bytes() != after.read_bytes():
                yield "bytes differ"


def same_array(one: dict[str, Any], other: dict[str, Any], key: str) -> bool:
    return key in one and key in other and one[key].shape == other[key].shape and bool((one[key] == other[key]).all())


def unlike_json(place: str, one: Any, other: Any) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            if not CHANGING.search(key):
                yield from unlike_json(f"{place}.{key}", one.get(key), other.get(key))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from unlike_json(f"{place}[{number}]", a, b)
    elif isinstance(one, float) and isinstance(other, float) and math.isclose(one, other, rel_tol=1e-12):
        return  # sums over rows in another order
    elif repr(one) != repr(other) and not (isinstance(one, str) and isinstance(other, str) and "/" in one):
        yield f"{place}: {str(one)[:100]} and {str(other)[:100]}"


if __name__ == "__main__":
    sys.exit(main())
