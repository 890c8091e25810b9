"""Settings of `raygr prepare`."""

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from raygr.config import STRICT, Place, RawFiles, RayUse, refuse


@dataclass(frozen=True, config=STRICT, kw_only=True)
class PrepareConfig:
    """Raw reviews and metadata -> items, reviews, users, interactions with their split (4.1, A.1)."""

    SPEED: ClassVar = frozenset({"parallelism", "ray"})

    output: Place
    """Folder of the run, local or any fsspec URI."""
    reviews: tuple[RawFiles, ...]
    """Files or globs, local or any fsspec URI: JSON lines (`.jsonl`, `.json`, `.ndjson`), CSV (any other ending),
    `.dat`, `.data`, all of them also `.gz`, `.bz2`, `.xz`, `.zip`; and `.parquet`."""
    metadata: tuple[RawFiles, ...] = ()
    """Files or globs of item metadata, of the same kinds as `reviews`."""
    format: Literal["amazon", "movielens", "table"] = "amazon"
    """Layout of the files: Amazon's reviews, MovieLens's `.dat` and `.data`, or tables of your own with `columns`."""
    columns: Mapping[str, str | int] = Field(default_factory=dict)
    """`table` only, like the next four fields: raygr's name -> the file's name. raygr's names for reviews are user_id,
    item_id, rating, timestamp, review_title and review_text; for metadata item_id, title, description, categories and
    details."""
    item_columns: Mapping[str, str | int] = Field(default_factory=dict)
    """The same for metadata, where a name differs from `columns`; numbers are positions in files without a header."""
    header: bool = True
    """Whether the CSV files of reviews begin with a line of names; if not, `columns` holds positions from 0."""
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    """Character between the values of CSV files; null finds comma, semicolon, tab or bar by the names in the header."""
    encoding: str | None = None
    """Encoding of text files, such as cp1252 or utf-16; null is UTF-8, and Windows-1252 for texts that are not."""
    timestamps: Literal["time", "position"] = "time"
    """`time`: dates (ISO 8601, or with the month's name; UTC without a zone) and seconds, milliseconds, microseconds
    or nanoseconds since 1970; `position`: whole numbers that are only an order inside each user."""
    rating_range: tuple[float, float] | None = None
    """Lowest and highest valid rating; null becomes 1 and 5, for `movielens` 0.5 and 5."""
    keep_duplicate: Literal["first", "last", "all"] = "first"
    """Which of several interactions of one user with one item is kept. `all` is for repeat purchases: an item that a
    user has already had can be a target, so it is ranked, recommended and drawn as a negative like any other."""
    filter: Literal["k_core", "items_then_users", "users_then_items"] = "k_core"
    """Apply the minimum counts until no row is dropped any more (k-core), or once in the named order."""
    min_user_interactions: int = Field(default=5, ge=1)
    """Fewest interactions of a user that is kept."""
    min_item_interactions: int = Field(default=5, ge=1)
    """Fewest interactions of an item that is kept."""
    sample_users: int | None = Field(default=None, ge=1)
    """Number of users drawn with `seed` before the filter; null keeps all users."""
    last_interactions: int | None = Field(default=None, ge=3)
    """Number of newest interactions kept per user, before the filter; null keeps all interactions."""
    split: Literal["leave_one_out", "temporal"] = "leave_one_out"
    """Validation and test are each user's last interactions, or all interactions after a point in time."""
    test_interactions: int = Field(default=1, ge=1)
    """`leave_one_out`: number of last interactions of each user that are test; the one before them is validation. 1 is
    the published split. A user always keeps one train interaction, so a short history has fewer test interactions. More
    than one needs `targets: [every]` in `raygr train`, which ranks each of them after all interactions before it."""
    temporal_quantile: float = Field(default=0.9, gt=0, lt=1)
    """`temporal`: interactions after this quantile of all times are test, and the tenth before it is validation."""
    new_items: float = Field(default=0.0, ge=0, lt=1)
    """Share of the items that training must not know: no interaction with them is train, validation or test. They are
    ranked as new items, each after the user's other interactions before it."""
    new_items_by: Literal["seed", "time"] = "seed"
    """How new items are chosen: at random with `seed`, or the items whose first interaction is newest."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """Highest share of rows that cannot be read; above it the stage stops."""
    allow_broken_files: bool = False
    """Continue without the unreadable rest of damaged files, such as an incomplete download."""
    max_text_chars: int = Field(default=20_000, ge=1)
    """Longer texts are cut to this length, and their number is reported."""
    parallelism: int = Field(default=1, ge=1)
    """Number of raw files that tasks on Ray read at the same time, each with one CPU; 1 reads one file after the other
    in the calling process, with all its CPUs."""
    ray: RayUse = "auto"
    """`auto` works in the calling process where `parallelism` is 1, outside a cluster; the results are the same."""
    seed: int = 0
    """Seed of all draws, such as `sample_users`."""

    def __post_init__(self) -> None:
        if self.rating_range is None:
            object.__setattr__(self, "rating_range", (0.5 if self.format == "movielens" else 1.0, 5.0))

    @model_validator(mode="after")
    def check(self) -> Self:
        unused = {
            "on split: temporal": ("test_interactions",) if self.split == "temporal" else (),
            "without new_items": () if self.new_items else ("new_items_by",),
        }
        by_order = self.new_items_by == "time" and self.timestamps == "position"
        contradictions = {
            "new_items_by: time needs times, but timestamps: position has only an order": by_order,
            "ray: never reads in the calling process, one file after the other: set parallelism: 1": (
                self.ray == "never" and self.parallelism > 1
            ),
        }
        refuse(self, unused, contradictions)
        return self
