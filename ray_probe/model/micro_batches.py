"""Which responses are scored together: as many tokens as are allowed, of like length, so that little is padding."""

from collections.abc import Sequence

MOST_PADDING = 0.15
"""Share of a micro-batch's positions that may be padding."""


def plan_micro_batches(lengths: Sequence[int], sequences: int, tokens: int) -> list[list[int]]:
    """Places of the responses that are scored together, longest first.

    A micro-batch is a rectangle: its responses times the longest of them. It takes on the next shorter response while
    that keeps to both limits, and padding to `MOST_PADDING`. One response that is longer than `tokens` is alone.

    Args:
        lengths: tokens of each response with its prompt.
        sequences: responses in a micro-batch, at most.
        tokens: positions in a micro-batch, padding included, at most.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    batches: list[list[int]] = []
    real = 0
    for place in order:
        width = lengths[batches[-1][0]] if batches else 0
        positions = width * (len(batches[-1]) + 1) if batches else 0
        fits = batches and len(batches[-1]) < sequences and positions <= tokens
        if fits and real + lengths[place] >= (1.0 - MOST_PADDING) * positions:
            batches[-1].append(place)
            real += lengths[place]
        else:
            batches.append([place])
            real = lengths[place]
    return batches
