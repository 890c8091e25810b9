"""The counts of a prepare run, for run.json and for the console."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from raygr.data.row_counts import log_rows
from raygr.prepare import selection
from raygr.prepare.bad_rows import Tally
from raygr.prepare.coded_rows import CodedRows
from raygr.prepare.config import PrepareConfig
from raygr.prepare.selection import Dropped, Kept, ScannedInteractions
from raygr.prepare.splits import PARTS, TEST_PART, TRAIN_PART

logger = logging.getLogger(__name__)


def kept_and_counts(rows: CodedRows, tally: Tally, config: PrepareConfig) -> tuple[Kept, dict[str, Any]]:
    """The kept interactions of usable rows, and the counts of `kept_counts`; columns are moved out of `rows`."""
    reduced, dropped = selection.reduce(selection.from_rows(rows), config)
    kept, dropped["only_new_items"] = selection.assign(reduced, config)
    return kept, kept_counts(reduced, kept, dropped, tally, config)


def kept_counts(
    reduced: ScannedInteractions,
    kept: Kept,
    dropped: Mapping[str, Dropped],
    tally: Tally,
    config: PrepareConfig,
) -> dict[str, Any]:
    """The counts of reviews, users and reviewed items, read, kept and dropped by reason, and of each part."""
    record = tally.record()
    record["by_reason"] |= {reason: one.interactions for reason, one in dropped.items() if one.interactions}
    users_with = {
        part: int(np.count_nonzero(np.bincount(kept.user_index[kept.part == part]))) for part in (TRAIN_PART, TEST_PART)
    }
    sizes = np.bincount(kept.part, minlength=len(PARTS)).tolist()
    tests = np.bincount(kept.user_index[kept.part == TEST_PART], minlength=len(kept.user_ids))
    new: dict[str, Any] = {}
    if config.new_items:
        record["by_reason"]["with_new_items"] = len(kept.new.user_index)
        new["new_items"] = {
            "items": kept.new_items,
            "interactions": len(kept.new.user_index),
            "without_history": int((kept.new.position == 0).sum()),
        }
    if config.test_interactions > 1:
        new["users_with_fewer_tests"] = int(((tests > 0) & (tests < config.test_interactions)).sum())
    return {
        "reviews": {"kept": len(kept.row), **record},
        "users": {
            "read": len(reduced.user_ids),
            "kept": len(kept.user_ids),
            "by_reason": {reason: one.users for reason, one in dropped.items() if one.users},
            **{f"no_{PARTS[part]}": len(kept.user_ids) - count for part, count in users_with.items()},
        },
        "reviewed_items": {
            "read": len(reduced.item_ids),
            "kept": len(kept.item_ids),
            "by_reason": {reason: one.items for reason, one in dropped.items() if one.items},
        },
        "interactions": dict(zip(PARTS, sizes, strict=True)),
        **new,
    }


def log_counts(counts: Mapping[str, Any], config: PrepareConfig) -> None:
    """Logs what was read and left out, line by line, from the counts of run.json."""
    reviews, items = counts["reviews"], counts["items"]
    log_rows("reviews", read=reviews["read"], kept=reviews["kept"], dropped=reviews["by_reason"])
    if "duplicate" in reviews["by_reason"]:
        logger.info(
            "of each user and item only the %s review stays; keep_duplicate: all keeps repeats", config.keep_duplicate
        )
    for name in ("users", "reviewed_items"):
        one = counts[name]
        log_rows(name.replace("_", " "), read=one["read"], kept=one["kept"], dropped=one["by_reason"])
    new = counts.get("new_items")
    if new:
        logger.info(
            "new items: %d, with %d interactions that are in no other part; %d of them have no history before them",
            *new.values(),
        )
    described = items["kept"] - items["without_metadata"]
    if config.metadata:
        log_rows("rows of metadata", read=items["read"], kept=described, dropped=items["by_reason"])
    for note in count_notes(counts, tests=config.test_interactions, longest=config.max_text_chars):
        logger.info(note)


def count_notes(counts: Mapping[str, Any], *, tests: int, longest: int) -> list[str]:
    """What the kept rows lack, in sentences, from the counts of run.json.

    `tests` is the wanted number of test interactions of a user, `longest` the most characters of a text.
    """
    reviews, items, users = counts["reviews"], counts["items"], counts["users"]
    repaired = "{:,} of {:,} %s have texts that are no UTF-8 (read as Windows-1252) or hold U+FFFD: set “encoding”"
    notes = {
        "{:,} of {:,} items have no metadata": (items["without_metadata"], items["kept"]),
        "{:,} of {:,} items have no title or text": (items["without_text"], items["kept"]),
        "{:,} of {:,} users have no train interaction": (users["no_train"], users["kept"]),
        "{:,} of {:,} users have no test interaction": (users["no_test"], users["kept"]),
        f"{{:,}} of {{:,}} users have fewer than {tests} test interactions": (
            counts.get("users_with_fewer_tests", 0),
            users["kept"] - users["no_test"],
        ),
        repaired % "reviews": (reviews["text_repaired"], reviews["kept"]),
        repaired % "items": (items["text_repaired"], items["kept"]),
        "{:,} review texts were cut to {:,} characters": (reviews["text_cut"], longest),
        "{:,} item texts were cut to {:,} characters": (items["text_cut"], longest),
    }
    return [text.format(count, whole) for text, (count, whole) in notes.items() if count]
