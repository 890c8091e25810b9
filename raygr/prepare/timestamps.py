"""Times in all common forms to milliseconds since 1970; an ambiguous form is refused.

Numbers are seconds, milliseconds, microseconds or nanoseconds. Their size tells the unit, because between 1990 and 2100
no number fits two units. Dates without a time zone are UTC. Fractions of a millisecond are cut off.
"""

import warnings
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

YEAR_1990_MS, YEAR_2100_MS = 631_152_000_000, 4_102_444_800_000

# How a value was read, by its code in `Times.form`; the first three were not read. "declared": the format fixes the
# unit.
FORMS = ("time_not_read", "time_out_of_range", "date_as_number", "declared",
         "dates", "seconds", "milliseconds", "microseconds", "nanoseconds", "positions")  # fmt: skip
NOT_READ, OUT_OF_RANGE, DATE_AS_NUMBER, DECLARED = range(4)
DATES, SECONDS, MILLISECONDS, MICROSECONDS, NANOSECONDS, POSITIONS = range(4, 10)
PER_SECOND = {SECONDS: 1, MILLISECONDS: 10**3, MICROSECONDS: 10**6, NANOSECONDS: 10**9}
ARROW_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
LAST_POSITION = 2**53

NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,2})?\s*$"
WHOLE = r"^\s*-?[0-8]?\d{1,18}\s*$"  # fits into 64 bits

# Only dates that begin with the year or name their month are read; "03/04/2025" is ambiguous.
CLOCK = r"\d{1,2}(:\d\d(:\d\d([.,]\d+)?)?)?( ?[ap]m)?"
ZONE = r" ?(z|utc|gmt|[+-]\d\d(:?\d\d)?)"
WEEKDAY = r"((mon|tue|wed|thu|fri|sat|sun)[a-z]*,? +)?"
MONTH = r"(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
YEAR_FIRST = (
    rf"(?i)^\s*(\d{{4}}[-/.](0?[1-9]|1[0-2])([-/.](0?[1-9]|[12]\d|3[01]))?([t ]+{CLOCK}({ZONE})?)?|"
    rf"\d{{8}}t\d{{4}}(\d\d([.,]\d+)?)?({ZONE})?)\s*$"
)
NAMED_MONTH = (
    rf"(?i)^\s*{WEEKDAY}((\d{{1,2}}[ -]{MONTH}|{MONTH} +\d{{1,2}}),?[ -]+\d{{4}}(,?[t ]+{CLOCK}({ZONE})?)?|"
    rf"{MONTH} +\d{{1,2}} +\d{{1,2}}:\d\d:\d\d( ([+-]\d{{4}}|utc|gmt))? +\d{{4}})\s*$"
)
# pandas reads the first two with compiled code, the last one value by value.
PANDAS_FORMATS = ("ISO8601", "%a %b %d %H:%M:%S %z %Y", "mixed")


class Times(NamedTuple):
    """N times: milliseconds since 1970, NaN where not read, and the codes of their forms."""

    milliseconds: np.ndarray
    form: np.ndarray


def read_times(values: pa.Array, kind: Literal["time", "position"]) -> Times:
    """Times from dates, numbers or strings (as `column_values.plain` gives them); positions stay as they are."""
    if pa.types.is_timestamp(values.type) or pa.types.is_date(values.type):
        return read_dates(values) if kind == "time" else unread(len(values))
    if pa.types.is_string(values.type):
        return read_texts(values, kind)
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type) or pa.types.is_decimal(values.type)):
        return unread(len(values))
    return read_numbers(values, kind)


def unread(count: int) -> Times:
    return Times(np.full(count, np.nan), np.full(count, NOT_READ, np.int8))


def read_dates(dates: pa.Array) -> Times:
    """Times from Arrow's dates and timestamps; Arrow stores those with a zone in UTC."""
    if pa.types.is_date(dates.type):
        dates, unit = dates.cast(pa.date64()), "ms"
    else:
        unit = dates.type.unit
    known = dates.is_valid().to_numpy(zero_copy_only=False)
    milliseconds = scaled(dates.cast(pa.int64()).fill_null(0).to_numpy(), ARROW_UNITS[unit])
    return checked(np.where(known, milliseconds, np.nan), np.where(known, DATES, NOT_READ))


def scaled(numbers: np.ndarray, per_second: int) -> np.ndarray:
    """Milliseconds of numbers in a unit, rounded down."""
    if per_second == 1:  # rounded first: 1.123 s times 1000 is 1122.9999...
        return np.floor(np.round(numbers.astype(np.float64) * 1000, 3))
    return np.floor_divide(numbers, per_second // 1000).astype(np.float64)


def checked(milliseconds: np.ndarray, form: np.ndarray) -> Times:
    """The times; those outside 1990 to 2100 are marked as out of range."""
    outside = (milliseconds < YEAR_1990_MS) | (milliseconds > YEAR_2100_MS)
    return Times(milliseconds, np.where(outside, OUT_OF_RANGE, form).astype(np.int8))


def read_numbers(numbers: pa.Array, kind: Literal["time", "position"]) -> Times:
    """Times from numbers of any type; integers keep all their digits."""
    known = numbers.is_valid().to_numpy(zero_copy_only=False)
    is_int64 = pa.types.is_integer(numbers.type) and numbers.type != pa.uint64()
    values = numbers.cast(pa.int64() if is_int64 else pa.float64(), safe=False).fill_null(0).to_numpy()
    known &= np.isfinite(values)
    if kind == "time":
        return read_epochs(values, known)
    good = known & (values >= 0) & (values <= LAST_POSITION) & (values == np.floor(values))
    form = np.select([good, known], [POSITIONS, OUT_OF_RANGE], NOT_READ).astype(np.int8)
    return Times(np.where(known, values, np.nan).astype(np.float64), form)


def read_epochs(values: np.ndarray, known: np.ndarray) -> Times:
    """Times from numbers, each in the unit that puts it between 1990 and 2100."""
    milliseconds = np.where(known, values, np.nan).astype(np.float64)
    form = np.where(known, OUT_OF_RANGE, NOT_READ).astype(np.int8)
    for unit, per_second in PER_SECOND.items():
        low, high = (year // 1000 * per_second for year in (YEAR_1990_MS, YEAR_2100_MS))
        fits = known & (values >= low) & (values <= high)
        if fits.any():
            milliseconds[fits], form[fits] = scaled(values[fits], per_second), unit
    # numbers such as 20250306, 202503061015 and 20250306101500
    numbers = np.where(known, values, 0)
    days = np.select([numbers >= 1e13, numbers >= 1e11], [numbers // 10**6, numbers // 10**4], numbers)
    year, month, day = days // 10_000, days // 100 % 100, days % 100
    is_date = (year >= 1900) & (year <= 2100) & (month >= 1) & (month <= 12) & (day >= 1) & (day <= 31)
    form[(form == OUT_OF_RANGE) & is_date] = DATE_AS_NUMBER
    return Times(milliseconds, form)


def read_texts(strings: pa.Array, kind: Literal["time", "position"]) -> Times:
    """Times from texts, which may hold numbers and dates side by side."""
    if pc.all(pc.match_substring_regex(strings, WHOLE)).as_py():
        return read_numbers(pc.utf8_trim_whitespace(strings).cast(pa.int64()), kind)
    whole, numeric = (pc.match_substring_regex(strings, regex) for regex in (WHOLE, NUMBER))
    trimmed = pc.utf8_trim_whitespace(strings)
    times = read_numbers(pc.if_else(numeric, trimmed, None).cast(pa.float64()), kind)
    if pc.any(whole).as_py():
        exact = read_numbers(pc.if_else(whole, trimmed, None).cast(pa.int64()), kind)
        times = merged(times, exact, whole.fill_null(False).to_numpy(zero_copy_only=False))
    if kind == "position":
        return times
    for forms, regex in ((PANDAS_FORMATS[::2], YEAR_FIRST), (PANDAS_FORMATS[1:], NAMED_MONTH)):
        matches = pc.match_substring_regex(strings, regex).fill_null(False)
        if pc.any(matches).as_py():
            which = matches.to_numpy(zero_copy_only=False)
            found = np.full(len(which), np.nan)
            found[which] = read_date_texts(trimmed.filter(matches), forms)
            times = merged(times, checked(found, np.where(np.isnan(found), NOT_READ, DATES)), which)
    return times


def merged(one: Times, other: Times, which: np.ndarray) -> Times:
    """`other` where the mask `which` holds, else `one`."""
    return Times(*(np.where(which, b, a) for a, b in zip(one, other, strict=True)))


def read_date_texts(texts: pa.Array, formats: tuple[str, ...]) -> np.ndarray:
    """Milliseconds of dates in one of pandas' `formats`; NaN where there is no such day."""
    import pandas as pd  # a second of start-up that most data do not need

    unique = texts.dictionary_encode()
    values = pd.Series(unique.dictionary.to_pylist(), dtype=object)
    found = np.full(len(values), np.nan)
    for form in formats:
        left = np.flatnonzero(np.isnan(found))
        if len(left):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dates = pd.to_datetime(values.iloc[left], format=form, utc=True, errors="coerce")
            known = dates.notna().to_numpy()
            found[left[known]] = dates[known].dt.as_unit("ms").astype(np.int64).to_numpy()
    return found[unique.indices.to_numpy()]
