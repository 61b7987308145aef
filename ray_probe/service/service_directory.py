"""The directory of a service: its configuration, its queue and its measurements."""

from pathlib import Path

from ray_probe.cluster.controller_actor import SERVICE_CONFIG
from ray_probe.config.loading import dump_yaml
from ray_probe.config.schema import ProbeConfig
from ray_probe.controller.state import STATE_FILE, ControllerState
from ray_probe.errors import ConfigError, bad_value
from ray_probe.system.digests import SUMS, record
from ray_probe.system.files import write_atomically


def prepare_directory(parent: Path, name: str) -> Path:
    """Creates the directory of a service (0700), or reopens it.

    Raises ConfigError for another directory of that name, or a damaged queue.
    """
    path = parent / name
    if path.exists() and not (path / STATE_FILE).exists() and any(path.iterdir()):
        raise ConfigError(bad_value("--name", name, f"{path} exists and belongs to no service; choose another name"))
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
    except OSError as error:
        raise ConfigError(bad_value("output.dir", str(parent), f"cannot be written ({error.strerror})")) from None
    state = ControllerState(path)  # reads the queue
    state.actors = None  # from now on as configured
    state.save()
    return path


def write_config(config: ProbeConfig, directory: Path) -> None:
    """Writes the service's configuration for its controller, also after a restart."""
    data = dump_yaml(config).encode()
    write_atomically(directory / SERVICE_CONFIG, data, private=True)
    (directory / SUMS).unlink(missing_ok=True)  # it lists nothing else, and may be damaged
    record(directory, {SERVICE_CONFIG: data})
