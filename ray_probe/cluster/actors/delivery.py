"""Calls of the fitter that outlast its death: Ray makes it again, and its ledger makes it what it was.

Everything that it is asked may be asked twice: a record that is in is a duplicate, a round that is closed stays closed.

A delivery and its receipt travel as lists of plain numbers, texts and bytes. Ray packs those without pickle, so that a
fitter answers about a tenth more of them in a second.
"""

import time
from typing import Any

import numpy as np
from ray.exceptions import ActorUnavailableError

from ray_probe.cluster.actors.calls import ask
from ray_probe.errors import ClusterError
from ray_probe.run.messages import Delivery, Opening, Receipt
from ray_probe.system.failpoints import fail_at

PAUSE_S = 0.1
REMEDY = "go on with run --resume"


def ask_again(actor: Any, who: str, method: str, *args: Any, deadline_s: float) -> Any:
    """Call a method that may be called twice, again and again while Ray makes the actor anew.

    Args:
        actor: its handle.
        who: what it is called in messages.
        method: name of the method.
        args: its arguments.
        deadline_s: seconds to wait in all.

    Raises:
        ProbeError: what the method raised.
        ClusterError: no answer in time, or the actor is gone for good.
    """
    give_up = time.monotonic() + deadline_s
    while True:
        try:
            return ask(actor, who, method, *args, deadline_s=max(give_up - time.monotonic(), PAUSE_S))
        except ClusterError as error:
            if time.monotonic() + PAUSE_S > give_up:
                raise ClusterError(f"{who}: no answer to {method!r} in {deadline_s:g} s; {REMEDY}") from error
            if not isinstance(error.__cause__, ActorUnavailableError):
                raise ClusterError(f"{error}; {REMEDY}") from error
        time.sleep(PAUSE_S)


def deliver(fitter: Any, opening: Opening, delivery: Delivery, deadline_s: float) -> Receipt:
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


def message_of(opening: Opening, delivery: Delivery) -> list[Any]:
    """A delivery for a measurement, as it travels."""
    record = [list(delivery.features), delivery.round, delivery.shard, delivery.packed.tobytes(), delivery.made_on]
    return [opening.id, opening.together, delivery.policy_id, *record]


def delivery_of(message: list[Any]) -> tuple[Opening, Delivery]:
    """What `message_of` was given."""
    name, together, policy_id, features, round_number, shard, packed, made_on = message
    packed = np.frombuffer(packed, np.float64)
    return Opening(name, together), Delivery(policy_id, tuple(features), round_number, shard, packed, made_on)


def answer_of(receipt: Receipt) -> list[Any]:
    """A receipt, as it travels."""
    return [receipt.status, *([] if receipt.kept is None else [receipt.kept.tobytes()])]


def receipt_of(answer: list[Any]) -> Receipt:
    """What `answer_of` was given."""
    status, *kept = answer
    return Receipt(status, np.frombuffer(kept[0], np.float64) if kept else None)
