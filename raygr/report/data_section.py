"""The report's section of the data: its size, the rows that were left out by reason, and what the kept ones lack."""

from collections.abc import Mapping
from typing import Any

from raygr.files import join, read_json
from raygr.prepare.run_counts import count_notes
from raygr.report.sections import Section, fact_table
from raygr.runs import RunRecord
from raygr.schema import STATISTICS


def data_section(run: str, record: RunRecord) -> Section:
    """A prepare run; rows that were left out and texts that were cut are its warnings."""
    counts, config = record.counts, record.config
    remarks = [left_out(counts["reviews"])] if counts["reviews"]["by_reason"] else []
    notes = count_notes(counts, tests=config["test_interactions"], longest=config["max_text_chars"])
    facts = fact_table("What the data holds", read_json(join(run, STATISTICS)))
    rows = fact_table("Rows in and out, by reason", counts)
    return Section("Data", "", [facts], [], [*remarks, *(f"{note}." for note in notes)], appendix=[rows])


def left_out(reviews: Mapping[str, Any]) -> str:
    """One sentence on the interactions that `prepare` did not keep."""
    reasons = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in reviews["by_reason"].items())
    missing = reviews["read"] - reviews["kept"]
    return (
        f"{missing:,} of {reviews['read']:,} interactions were left out ({missing / reviews['read']:.1%}): {reasons}."
    )
