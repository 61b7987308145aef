"""Gives commands that ask a service or a run the same options."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from ray_probe.cli.options import Address, AsJson, Name, Namespace
from ray_probe.cli.output import Answer, answered, stdout_for_results

if TYPE_CHECKING:
    from ray_probe.service.client import ProbeClient

_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_WHICH = (
    inspect.Parameter("name", _KEYWORD, default=None, annotation=Name),
    inspect.Parameter("address", _KEYWORD, default=None, annotation=Address),
    inspect.Parameter("namespace", _KEYWORD, default=None, annotation=Namespace),
    inspect.Parameter("as_json", _KEYWORD, default=False, annotation=AsJson),
)


def asks(ask: Callable[..., Answer], kind: str | None = None) -> Callable[..., int]:
    """Make a command of a function: (client, its own arguments) -> its answer.

    The command has the function's own arguments, and `--run`, `--address`, `--namespace` and `--json`.

    Args:
        ask: the function.
        kind: service or run, of which the command asks the only one that is up without `--run`; None: either.
    """

    @wraps(ask)
    def command(
        *, name: str | None = None, address: str | None = None, namespace: str | None = None, as_json: bool = False,
        **own: Any,
    ) -> int:  # fmt: skip
        with connected(name, address, namespace, kind) as client:
            answer = ask(client, **own)
        return answered(answer, as_json)

    _, *own = inspect.signature(ask).parameters.values()
    parameters = [*(parameter.replace(kind=_KEYWORD) for parameter in own), *_WHICH]
    vars(command)["__signature__"] = inspect.Signature(parameters, return_annotation=int)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": int}
    return command


asks_service = partial(asks, kind="service")


@contextlib.contextmanager
def connected(
    name: str | None, address: str | None, namespace: str | None, kind: str | None
) -> "Iterator[ProbeClient]":
    """Connect a client to a service or run."""
    from ray_probe.service.client import ProbeClient

    with stdout_for_results(), ProbeClient.connect(address, namespace, name, kind) as client:
        yield client
