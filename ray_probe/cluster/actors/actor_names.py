"""Names of a service's or a run's actors in its Ray namespace."""

CONTROLLER = "controller"
ROLLOUT = "rollout-"


def controller(name: str) -> str:
    """Return the name of the controller."""
    return f"{name}/{CONTROLLER}"


def fitter(name: str) -> str:
    """Return the name of the fitter."""
    return f"{name}/fitter"


def writer(name: str) -> str:
    """Return the name of the writer."""
    return f"{name}/writer"


def rollout(name: str, number: int) -> str:
    """Return the name of a rollout actor."""
    return f"{name}/{ROLLOUT}{number}"


def http(name: str) -> str:
    """Return the name of the web server, which outlives a controller's restart."""
    return f"{name}/http"


def owner(actor: str) -> str | None:
    """Return the service or run of a controller; None for other actors."""
    name, _, role = actor.rpartition("/")
    return name if role == CONTROLLER and name else None


def children(name: str, actors: list[str]) -> list[str]:
    """Return the names of fitter, writer and rollout actors of a service or run."""
    return [
        actor for actor in actors if actor in (fitter(name), writer(name)) or actor.startswith(f"{name}/{ROLLOUT}")
    ]
