"""Times in all forms to milliseconds; ambiguous ones are refused with their reason."""

import datetime

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygr.prepare.timestamps import FORMS, read_times

MARCH_6 = 1_741_294_800_123  # 2025-03-06 21:00:00.123 UTC
TIMES = st.integers(min_value=631_152_000_000, max_value=4_102_444_800_000)


def read(values: list, type: pa.DataType | None = None, kind: str = "time") -> list[tuple[float, str]]:
    times = read_times(pa.array(values, type), kind)
    return [(ms, FORMS[form]) for ms, form in zip(times.milliseconds.tolist(), times.form.tolist(), strict=True)]


@pytest.mark.parametrize(
    "text",
    ["2025-03-06T21:00:00.123Z", "2025-03-06T23:00:00.123+02:00", "2025-03-06 21:00:00.123456", "20250306T210000.123Z",
     "2025-03-06 21:00:00.123 UTC", "06 Mar 2025 21:00:00.123", "March 6, 2025 9:00:00.123 PM"],
)  # fmt: skip
def test_dates_as_text(text):
    assert read([text]) == [(MARCH_6, "dates")]


@pytest.mark.parametrize(
    ("number", "form"),
    [(1_741_294_800, "seconds"), (MARCH_6, "milliseconds"), (MARCH_6 * 1000 + 999, "microseconds"),
     (MARCH_6 * 10**6 + 999_999, "nanoseconds")],
)  # fmt: skip
def test_every_epoch_unit_as_number_and_as_text(number, form):
    right = MARCH_6 - (123 if form == "seconds" else 0)
    assert read([number]) == read([str(number)]) == [(right, form)]


@pytest.mark.parametrize(
    ("value", "reason"),
    [("20250306", "date_as_number"), (20250306101500, "date_as_number"), ("1741294", "time_out_of_range"),
     (5, "time_out_of_range"), ("03/04/2025", "time_not_read"), ("now", "time_not_read"), ("10:00", "time_not_read"),
     ("2025-02-30", "time_not_read"), ("1969-12-31", "time_out_of_range"), (None, "time_not_read")],
)  # fmt: skip
def test_what_is_no_time_is_refused_by_name(value, reason):
    assert [form for _, form in read([value])] == [reason]


def test_positions_are_taken_as_they_are():
    assert read(["0", "1741294", "-1", "x"], kind="position") == [
        (0, "positions"), (1741294, "positions"), (-1, "time_out_of_range"), (pytest.approx(float("nan"), nan_ok=True),
        "time_not_read")]  # fmt: skip


def test_dates_and_numbers_side_by_side_keep_their_forms():
    assert [form for _, form in read(["2025-03-06", "1741294800", "1741294800000"])] == [
        "dates", "seconds", "milliseconds"]  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.lists(TIMES, min_size=1, max_size=20), st.sampled_from(["s", "ms", "us", "ns"]), st.booleans())
def test_any_time_is_read_back_from_any_arrow_timestamp_and_text(times, unit, zone):
    type = pa.timestamp(unit, "UTC" if zone else None)
    stamps = pa.array(times, pa.timestamp("ms", "UTC" if zone else None)).cast(type, safe=False)
    floor = 1000 if unit == "s" else 1
    assert [ms for ms, _ in read(stamps.to_pylist(), type)] == [t // floor * floor for t in times]
    texts = [datetime.datetime.fromtimestamp(0, datetime.UTC) + datetime.timedelta(milliseconds=t) for t in times]
    assert [ms for ms, _ in read([text.isoformat() for text in texts])] == times
