"""Refused rows: their reasons, counts and examples, and the error when there are too many of them."""

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from raygr.prepare.timestamps import FORMS

EXAMPLES_PER_REASON = 3
SNIPPET_CHARS = 120

FATAL_REASONS = ("missing_columns", "not_json_lines", "misnamed_file")  # a wrong setting loses the whole file
BROKEN = "broken_"  # reasons of files that end too early begin so; the compression or "parquet" follows

# What can be done about a reason, or what would have been accepted.
REMEDIES = {
    "missing_columns": "columns, item_columns, delimiter and header describe the table",
    "time_not_read": "a time is an ISO 8601 date, a date with the name of its month, or seconds, milliseconds, "
    "microseconds or nanoseconds since 1970; with timestamps: position it is a whole number",
    "time_out_of_range": "outside 1990 to 2100 in every unit, or in the unit that the format declares; numbers that "
    "give only an order need timestamps: position",
    "date_as_number": "20250306 could also be seconds or a position: write 2025-03-06",
    "rating_out_of_range": "rating_range sets what is valid",
    "rating_not_a_number": "a rating is a number such as 4 or 4.5",
    "invalid_utf8": "set encoding to that of the file, such as cp1252",
    "unclosed_quote": "the quote does not close before the next rows",
}


class InputError(ValueError):
    """Raw data cannot be prepared; the message gives the counts and what to change."""


class Refusal(NamedTuple):
    """A row that cannot be used, by its number in the file from 0; or the row at which a file ends too early."""

    row: int
    reason: str
    snippet: str


class Example(NamedTuple):
    """The place of a refused row; `line` counts from 1 and is approximate in CSV files."""

    file: str
    line: int
    snippet: str


class Tally:
    """Counts of the rows read, and of the rows refused by reason, over all files."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files = files
        self.read = 0
        self.by_reason: Counter[str] = Counter()
        self.examples: dict[str, list[Example]] = {}
        self.time_forms: Counter[str] = Counter()
        self.time_range: tuple[int, int] | None = None

    def add(self, rows: pa.Table, file: int) -> None:
        """Counts rows of SCAN_SCHEMA from the file with this index; a row with a reason is refused."""
        self.read += rows.num_rows
        bad = rows.filter(pc.is_valid(rows["reason"]))
        self._add_times(usable(rows))
        for entry in bad["reason"].value_counts().to_pylist():
            self.by_reason[entry["values"]] += entry["counts"]
        shown = bad.filter(pc.is_valid(bad["snippet"])).select(["row", "reason", "snippet"])
        for row in shown.to_pylist():
            example = Example(self.files[file], row["row"] + 1, row["snippet"])
            # Ray delivers files in any order; sorted examples are the same in every run.
            examples = sorted([*self.examples.get(row["reason"], []), example])
            self.examples[row["reason"]] = examples[:EXAMPLES_PER_REASON]

    def _add_times(self, good: pa.Table) -> None:
        times = good["timestamp"].drop_null()
        if len(times) == 0:
            return
        low, high = pc.min_max(times).as_py().values()
        known = self.time_range or (low, high)
        self.time_range = min(low, known[0]), max(high, known[1])
        for entry in good["time_form"].drop_null().value_counts().to_pylist():
            self.time_forms[FORMS[entry["values"]]] += entry["counts"]

    def times(self) -> str:
        """One line: the range of the times of usable rows, and the forms if there are several; "" without times."""
        if self.time_range is None:
            return ""
        shown = map(str if self.time_forms["positions"] else iso_time, self.time_range)
        forms = [f"{count} in {form}" for form, count in sorted(self.time_forms.items())]
        mixed = f" ({', '.join(forms)}: is this one clock?)" if len(forms) > 1 else ""
        return f"{'positions' if self.time_forms['positions'] else 'times'} from {' to '.join(shown)}{mixed}"

    def check(self, max_bad_fraction: float, *, what: str, allow_broken_files: bool = False) -> None:
        """InputError if no row is usable, a file or its rest is lost, or too many rows are refused."""
        bad = self.by_reason.total()
        fatal = [reason for reason in FATAL_REASONS if self.by_reason[reason]]
        if fatal:
            raise InputError(f"{what}: {', '.join(fatal)}: check format and columns\n{self.table()}")
        broken = [reason for reason in sorted(self.by_reason) if reason.startswith(BROKEN)]
        if broken and not allow_broken_files:
            raise InputError(f"{what}: {self.broken_files(broken)}; allow_broken_files: true ignores the rest")
        if self.read == bad:
            raise InputError(
                f"{what}: none of the {self.read} rows read is usable: check the files and format\n{self.table()}"
            )
        if bad > max_bad_fraction * self.read:
            raise InputError(
                f"{what}: {bad} of {self.read} rows are bad, more than max_bad_fraction={max_bad_fraction}: "
                f"check format, or raise max_bad_fraction\n{self.table()}"
            )

    def broken_files(self, reasons: Sequence[str]) -> str:
        """The files that end too early and the row where each ends; of many files only the first."""
        examples = [f"{e.file} {e.snippet}" for reason in reasons for e in self.examples[reason]]
        more = sum(self.by_reason[reason] for reason in reasons) - len(examples)
        return "; ".join(examples) + (f"; and {more} more files" if more else "")

    def table(self) -> str:
        """The counts with their remedies and examples, one line each."""
        lines = []
        for reason, count in sorted(self.by_reason.items()):
            remedy = REMEDIES.get(reason)
            lines.append(f"  {reason}: {count}" + (f" ({remedy})" if remedy else ""))
            lines += [f"    {e.file}:{e.line}: {e.snippet}" for e in self.examples.get(reason, [])]
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """The counts for run.json, with examples as {file, line, snippet}."""
        examples = {reason: [e._asdict() for e in shown] for reason, shown in sorted(self.examples.items())}
        times = {"times": self.times()} if self.time_range else {}
        return {"read": self.read, "by_reason": dict(sorted(self.by_reason.items())), "examples": examples, **times}


def usable(rows: pa.Table) -> pa.Table:
    """The rows of SCAN_SCHEMA without a reason."""
    return rows.filter(pc.is_null(rows["reason"])) if rows["reason"].null_count < rows.num_rows else rows


def iso_time(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def cut_snippet(raw: bytes | str) -> str:
    text = raw[: 4 * SNIPPET_CHARS].decode("utf-8", "replace") if isinstance(raw, bytes) else raw
    return text[:SNIPPET_CHARS]


def limited_snippets(reasons: Sequence[str | None], show: Callable[[int], bytes | str]) -> list[str | None]:
    """Snippets of the first EXAMPLES_PER_REASON rows of each reason, from what `show` gives; None for other rows."""
    seen: Counter[str] = Counter()
    snippets: list[str | None] = [None] * len(reasons)
    for i, reason in enumerate(reasons):
        if reason is not None and seen[reason] < EXAMPLES_PER_REASON:
            seen[reason] += 1
            snippets[i] = cut_snippet(show(i))
    return snippets
