"""Calls of the fitter that outlast its death: Ray makes it again, and its ledger makes it what it was.

Everything that it is asked may be asked twice: a record that is in is a duplicate, a round that is closed stays closed.

A delivery and its receipt travel as lists of plain numbers, texts and bytes. Ray packs those without pickle, so that a
fitter answers about a tenth more of them in a second.
"""

from typing import Any

import numpy as np

from ray_probe.cluster.actors.calls import ask_again
from ray_probe.run.messages import Delivery, FitterSession, Receipt
from ray_probe.system.failpoints import fail_at


def deliver(fitter: Any, opening: FitterSession, delivery: Delivery, deadline_s: float) -> Receipt:
    """Have the fitter take in a record, however often it dies meanwhile; returns its answer.

    Args:
        fitter: its Ray handle.
        opening: the measurement that it is open on.
        delivery: the record.
        deadline_s: seconds to wait in all.

    Raises:
        ProbeError: the record, or the ledger, is refused.
        ClusterError: no answer in time, or the fitter is gone for good.
    """
    shard = f"{delivery.round}/{delivery.shard}"
    fail_at("roll_before_send", shard)
    method = "accept_together" if opening.together else "accept"
    message = message_of(opening, delivery)
    receipt = receipt_of(ask_again(fitter, "fitter", method, message, deadline_s=deadline_s))
    fail_at("roll_after_send", shard)
    return receipt


def message_of(opening: FitterSession, delivery: Delivery) -> list[Any]:
    """A delivery for a measurement, as it travels."""
    record = [list(delivery.features), delivery.round, delivery.shard, delivery.packed.tobytes(), delivery.made_on]
    return [opening.id, opening.together, delivery.policy_id, *record]


def delivery_of(message: list[Any]) -> tuple[FitterSession, Delivery]:
    """What `message_of` was given."""
    name, together, policy_id, features, round_number, shard, packed, made_on = message
    packed = np.frombuffer(packed, np.float64)
    return FitterSession(name, together), Delivery(policy_id, tuple(features), round_number, shard, packed, made_on)


def answer_of(receipt: Receipt) -> list[Any]:
    """A receipt, as it travels."""
    return [receipt.status, *([] if receipt.kept is None else [receipt.kept.tobytes()])]


def receipt_of(answer: list[Any]) -> Receipt:
    """What `answer_of` was given."""
    status, *kept = answer
    return Receipt(status, np.frombuffer(kept[0], np.float64) if kept else None)
