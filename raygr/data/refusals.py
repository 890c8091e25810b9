"""Rows that were refused: their reasons, counts and examples, and the error when there are too many."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

EXAMPLES_PER_REASON = 3
SNIPPET_CHARS = 120

FATAL_REASONS = ("missing_columns", "unreadable_parquet")  # a whole file lost to a wrong setting


class InputError(ValueError):
    """Raw data that cannot be prepared, with the counts and what to change."""


class Refusal(NamedTuple):
    """One row (0-based in its file) that could not be used, or the row at which a file ends too early."""

    row: int
    reason: str
    snippet: str


class Example(NamedTuple):
    """Where a refused row stands: `line` counts from 1; in CSV it is approximate."""

    file: str
    line: int
    snippet: str


class Tally:
    """Rows read and rows refused, by reason, over all files."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files = files
        self.read = 0
        self.by_reason: Counter[str] = Counter()
        self.examples: dict[str, list[Example]] = {}

    def add(self, rows: pa.Table) -> None:
        """Counts scanned rows; a non-null `reason` is a refusal, `file` a place in `files`."""
        self.read += rows.num_rows
        bad = rows.filter(pc.is_valid(rows["reason"]))
        if bad.num_rows == 0:
            return
        for entry in bad["reason"].value_counts().to_pylist():
            self.by_reason[entry["values"]] += entry["counts"]
        shown = bad.filter(pc.is_valid(bad["snippet"])).select(["file", "row", "reason", "snippet"])
        for row in shown.to_pylist():
            self._show(row["reason"], Example(self.files[row["file"]], row["row"] + 1, row["snippet"]))

    def _show(self, reason: str, example: Example) -> None:
        # Ray delivers files in any order; sorting makes the examples the same in every run.
        self.examples[reason] = sorted([*self.examples.get(reason, []), example])[:EXAMPLES_PER_REASON]

    def check(self, max_bad_fraction: float, *, what: str) -> None:
        """InputError where nothing was read, a whole file was refused, or too many rows were."""
        bad = self.by_reason.total()
        fatal = [reason for reason in FATAL_REASONS if self.by_reason[reason]]
        if fatal:
            raise InputError(f"{what}: {', '.join(fatal)}; check format and columns\n{self.table()}")
        if self.read == bad:
            raise InputError(
                f"{what}: no usable row among {self.read} read; check the files and format\n{self.table()}"
            )
        if bad > max_bad_fraction * self.read:
            raise InputError(
                f"{what}: {bad} of {self.read} rows are bad, more than max_bad_fraction={max_bad_fraction}: "
                f"check format, or raise it\n{self.table()}"
            )

    def table(self) -> str:
        """The counts with their examples, one line each."""
        lines = []
        for reason, count in sorted(self.by_reason.items()):
            lines.append(f"  {reason}: {count}")
            lines += [f"    {e.file}:{e.line}: {e.snippet}" for e in self.examples.get(reason, [])]
        return "\n".join(lines)

    def record(self) -> Mapping[str, Any]:
        """For run.json: examples as {file, line, snippet}."""
        examples = {reason: [e._asdict() for e in shown] for reason, shown in sorted(self.examples.items())}
        return {"read": self.read, "by_reason": dict(sorted(self.by_reason.items())), "examples": examples}


def cut_snippet(raw: bytes | str) -> str:
    text = raw[: 4 * SNIPPET_CHARS].decode("utf-8", "replace") if isinstance(raw, bytes) else raw
    return text[:SNIPPET_CHARS]


def limited_snippets(reasons: Sequence[str | None], raw: Sequence[bytes | str]) -> list[str | None]:
    """A snippet for the first rows of each reason, None for every other row."""
    seen: Counter[str] = Counter()
    snippets: list[str | None] = [None] * len(reasons)
    for i, reason in enumerate(reasons):
        if reason is not None and seen[reason] < EXAMPLES_PER_REASON:
            seen[reason] += 1
            snippets[i] = cut_snippet(raw[i])
    return snippets
