"""Console lines that account for every row that a stage read."""

import logging
from collections.abc import Mapping

logger = logging.getLogger(__name__)


def log_rows(what: str, *, read: int, kept: int, dropped: Mapping[str, int]) -> None:
    """Logs rows read, rows kept, and dropped rows by reason; warns if these do not add up."""
    reasons = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in dropped.items() if count)
    logger.info("%s: %d of %d kept%s", what, kept, read, f"; left out: {reasons}" if reasons else "")
    missing = read - kept - sum(dropped.values())
    if missing:
        logger.warning("%s: %d rows are unaccounted for: this is a fault in raygr", what, missing)
