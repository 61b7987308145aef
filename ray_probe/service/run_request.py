"""What the command line asks of a run, and what is left of the run."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ray_probe.config.loading import load_config
from ray_probe.config.schema import ProbeConfig
from ray_probe.errors import ConfigError, ProbeError, bad_value
from ray_probe.run.directory import RunDirectory, default_name
from ray_probe.run.estimates import write_kept_result
from ray_probe.run.manifest import FREE_SECTIONS


@dataclass(frozen=True)
class RunRequest:
    """A request of the command line.

    Attributes:
        config: YAML file; None to resume.
        resume: directory of the run to resume, or None.
        overrides: `dotted.key=value` settings, applied in order.
        name: begins the name of the run's directory; empty: the name of the file.
    """

    config: Path | None
    resume: Path | None
    overrides: tuple[str, ...]
    name: str = ""


@dataclass
class Run:
    """The files of a run, filled in as it progresses.

    Attributes:
        directory: the run directory once it exists.
        finished_rounds: number of committed rounds.
        path: the run directory before it exists.
    """

    directory: Path | None = None
    finished_rounds: int = 0
    path: Path | None = None

    def keep(self) -> None:
        """Counts the committed rounds at the end of a run, and writes their result."""
        self.directory = self.path if self.path is not None and self.path.is_dir() else self.directory
        if self.directory is None:
            return
        with suppress(ProbeError):  # the error that ended the run counts
            self.finished_rounds = len(RunDirectory(self.directory).finished_rounds())
            if self.directory == self.path:
                write_kept_result(self.path)


def resolve(request: RunRequest) -> tuple[ProbeConfig, RunDirectory | None]:
    """Returns the configuration of a request, and the directory of a resumed run.

    Raises:
        InputError: the request is wrong.
    """
    if (request.config is None) == (request.resume is None) and not request.name:
        raise ConfigError("CONFIG: give either a config file or --resume RUN_DIR")
    if request.resume is None:
        config = load_config(request.config, request.overrides)
        if config.output.name is None:
            named = config.output.model_copy(update={"name": default_name(Path(request.name or str(request.config)))})
            config = config.model_copy(update={"output": named})
        return config, None
    for override in request.overrides:
        if override.split(".", 1)[0] not in FREE_SECTIONS:
            remedy = f"a resumed run takes only settings of {', '.join(FREE_SECTIONS)}"
            raise ConfigError(bad_value("--set", override, remedy))
        if override.split("=", 1)[0] in ("output.dir", "output.name"):
            raise ConfigError(bad_value("--set", override, "a resumed run stays in its directory; leave this out"))
    directory = RunDirectory.open(request.resume.resolve())
    directory.check_start()
    config = load_config(directory.config, request.overrides)
    here = config.output.model_copy(update={"dir": str(directory.path.parent), "name": directory.path.name})
    return config.model_copy(update={"output": here}), directory
