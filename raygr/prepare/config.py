"""Settings of `raygr prepare`."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from raygr.config import STRICT, Place, RawFiles


@dataclass(frozen=True, config=STRICT, kw_only=True)
class PrepareConfig:
    """Raw reviews and metadata -> items, reviews, users, interactions with their split (4.1, A.1)."""

    SPEED: ClassVar = frozenset({"parallelism"})

    output: Place
    reviews: tuple[RawFiles, ...]
    """Files or globs, local or any fsspec URI: JSON lines (`.jsonl`, `.json`, `.ndjson`), CSV (any other ending),
    `.dat`, `.data`, all of them also `.gz`, `.bz2`, `.xz`, `.zip`; and `.parquet`."""
    metadata: tuple[RawFiles, ...] = ()
    format: Literal["amazon", "movielens", "table"] = "amazon"
    columns: Mapping[str, str | int] = Field(default_factory=dict)
    """`table` only, as the next four: our name -> the file's; ours are user_id, item_id, rating, timestamp,
    review_title, review_text for reviews and item_id, title, description, categories, details for metadata."""
    item_columns: Mapping[str, str | int] = Field(default_factory=dict)
    """The same for metadata alone, where a name differs from `columns`; numbers are positions without a header."""
    header: bool = True
    """false: the CSV files of reviews have no line of names, and `columns` holds positions from 0."""
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    """Between the values of CSV files; null finds comma, semicolon, tab or bar by the names in the header."""
    encoding: str | None = None
    """Of text files, such as cp1252 or utf-16; null is UTF-8, and texts that are not are read as Windows-1252."""
    timestamps: Literal["time", "position"] = "time"
    """`time`: dates (ISO 8601, or with the month's name; UTC without a zone) and seconds, milliseconds, microseconds
    or nanoseconds since 1970; `position`: whole numbers that are only an order inside each user."""
    rating_range: tuple[float, float] | None = None
    """Lowest and highest valid rating; null becomes 1 and 5, for `movielens` 0.5 and 5."""
    keep_duplicate: Literal["first", "last", "all"] = "first"
    """Which of several interactions of one user with one item stays; `all` is for repeat purchases: items that a user
    has had may be targets, so they are ranked, recommended and drawn as negatives like any other."""
    filter: Literal["k_core", "items_then_users", "users_then_items"] = "k_core"
    """Minimum counts until nothing more falls out, or in one pass in the named order."""
    min_user_interactions: int = Field(default=5, ge=1)
    min_item_interactions: int = Field(default=5, ge=1)
    sample_users: int | None = Field(default=None, ge=1)
    """Users drawn with `seed` before the filter; null keeps all."""
    last_interactions: int | None = Field(default=None, ge=3)
    """A user's newest interactions that are kept, before the filter; null keeps all."""
    split: Literal["leave_one_out", "temporal"] = "leave_one_out"
    temporal_quantile: float = Field(default=0.9, gt=0, lt=1)
    """`temporal`: interactions after this quantile of all times are test, the tenth before it validation."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    allow_broken_files: bool = False
    """Go on without the rest of files that break off or cannot be read (a download cut short)."""
    max_text_chars: int = Field(default=20_000, ge=1)
    """Longer texts are cut, and counted."""
    parallelism: int = Field(default=1, ge=1)
    """Files read at the same time; each takes one CPU."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rating_range is None:
            object.__setattr__(self, "rating_range", (0.5 if self.format == "movielens" else 1.0, 5.0))
