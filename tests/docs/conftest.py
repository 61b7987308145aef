"""One small finished run in this process, for what pages say of results."""

from pathlib import Path

import pytest
from support.runs import Job, a_checkpoint, settings


@pytest.fixture(scope="session")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run."""
    place = tmp_path_factory.mktemp("docs")
    job = Job.of(settings(a_checkpoint(place)), place / "run")
    job.run()
    return job.path
