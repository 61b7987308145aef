"""Drops responses that were kept for the next comparison, once that has used them."""

import logging
from collections.abc import Iterable
from pathlib import Path

from ray_probe.controller.queue import OPEN, Measurement
from ray_probe.run.comparison.chain import drop_responses, responses_of

logger = logging.getLogger("ray_probe")


def drop_used_responses(ended: Measurement, items: Iterable[Measurement]) -> None:
    """Remove the responses that a finished comparison took from its service.

    A measurement that failed or was cancelled may be queued again, so it removes nothing; nor does one whose responses
    an open measurement takes too.

    Args:
        ended: the measurement.
        items: all measurements of the service.
    """
    source = _source(ended)
    if ended.state != "done" or source is None:
        return
    items = tuple(items)
    own = {Path(item.directory).resolve() for item in items}
    wanted = {_source(item) for item in items if item.state in OPEN}
    if source in own and source not in wanted and responses_of(source).is_dir():
        drop_responses(source)
        logger.info("%s: the responses that %s kept for it are removed", ended.id, source.name)


def _source(item: Measurement) -> Path | None:
    """Return the run directory that a measurement takes responses from, or None."""
    found = item.config.get("compare", {}).get("responses_from")
    return None if found is None else Path(found).resolve()
