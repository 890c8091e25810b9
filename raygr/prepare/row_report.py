"""What `prepare` read and left out, on the console."""

import logging
from collections.abc import Mapping
from typing import Any

from raygr.data.row_counts import log_rows
from raygr.prepare.config import PrepareConfig

logger = logging.getLogger(__name__)


def log_prepared(counts: Mapping[str, Any], config: PrepareConfig) -> None:
    """What `prepare` read and left out, line by line, from the counts of its run.json."""
    reviews, items, users = counts["reviews"], counts["items"], counts["users"]
    log_rows("reviews", read=reviews["read"], kept=reviews["kept"], dropped=reviews["by_reason"])
    if "duplicate" in reviews["by_reason"]:
        logger.info("of each user and item the %s stays; keep_duplicate: all keeps repeats", config.keep_duplicate)
    for name in ("users", "reviewed_items"):
        one = counts[name]
        log_rows(name.replace("_", " "), read=one["read"], kept=one["kept"], dropped=one["by_reason"])
    described = items["kept"] - items["without_metadata"]
    if config.metadata:
        log_rows("rows of metadata", read=items["read"], kept=described, dropped=items["by_reason"])
    notes = {
        "%d of %d items have no metadata": (items["without_metadata"], items["kept"]),
        "%d of %d items have no title or text": (items["without_text"], items["kept"]),
        "%d of %d users have no train interaction": (users["no_train"], users["kept"]),
        "%d of %d users have no test interaction": (users["no_test"], users["kept"]),
        "%d of %d reviews have texts that are no UTF-8 (read as Windows-1252) or hold U+FFFD: set `encoding`": (
            reviews["text_repaired"],
            reviews["kept"],
        ),
        "%d of %d items have texts that are no UTF-8 (read as Windows-1252) or hold U+FFFD: set `encoding`": (
            items["text_repaired"],
            items["kept"],
        ),
        "%d review texts were cut to %d characters": (reviews["text_cut"], config.max_text_chars),
        "%d item texts were cut to %d characters": (items["text_cut"], config.max_text_chars),
    }
    for text, (count, whole) in notes.items():
        if count:
            logger.info(text, count, whole)
