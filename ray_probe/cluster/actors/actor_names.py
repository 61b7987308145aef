"""Names of a service's or a run's actors in its Ray namespace."""

CONTROLLER = "controller"
ROLLOUT = "rollout-"


def controller(name: str) -> str:
    """The actor that is asked."""
    return f"{name}/{CONTROLLER}"


def fitter(name: str) -> str:
    """The actor that owns the records."""
    return f"{name}/fitter"


def writer(name: str) -> str:
    """The actor that puts committed gradients on disk."""
    return f"{name}/writer"


def rollout(name: str, number: int) -> str:
    """A rollout actor."""
    return f"{name}/{ROLLOUT}{number}"


def owner(actor: str) -> str | None:
    """The service or run that a controller of this name belongs to; None for other actors."""
    name, _, role = actor.rpartition("/")
    return name if role == CONTROLLER and name else None


def children(name: str, actors: list[str]) -> list[str]:
    """Of these actors, those that have the name of a fitter, writer or rollout actor of the service or run."""
    return [
        actor for actor in actors if actor in (fitter(name), writer(name)) or actor.startswith(f"{name}/{ROLLOUT}")
    ]
