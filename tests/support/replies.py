"""Replies as a service at work would give them, to be varied by tests with `dataclasses.replace`."""

from ray_probe.controller.replies import Actor, BetaReply, MeasurementInfo, Status, Variance
from ray_probe.run.progress import Progress
from ray_probe.run.result import Beta, Result
from support.results import a_result


def a_progress() -> Progress:
    """In the second of four rounds."""
    return Progress(1, 4, 8, 3, 1, 12345, 27.5, 3, 2, 3, 0.0434)


def an_info() -> MeasurementInfo:
    """A measurement at work with one whole round behind it."""
    result = Result.from_json(a_result())
    return MeasurementInfo(
        id="m0003", checkpoint="/checkpoints/run-7/step-[200]", adapter=None, state="running",
        directory="/runs/demo/m0003", rounds=1, sequences=1024, entropy=result.entropy, gradient=result.gradient,
        beta_version=1, submitted="2026-05-01T11:58:00+00:00", started="2026-05-01T12:03:11+00:00", finished=None,
        cause=None, exit_code=None,
    )  # fmt: skip


def a_status() -> Status:
    """A service that measures, with one actor of three missing and nothing to warn of."""
    actors = (
        Actor(4, "collect 1/3", "10.0.0.7", 41234, 81234),
        Actor(6, "accumulate 1/0, leaving", "10.0.0.8", 41235, 1234),
        Actor(7, "starting", None, None, None),
    )
    return Status(
        name="demo", kind="service", state="measuring", namespace="ray_probe", directory="/runs/demo",
        since="2026-05-01T10:00:00+00:00", draining=False, actors_asked=3, actors_alive=2, actors=actors,
        last_failure=None, problem=None, measurement=an_info(), progress=a_progress(), shards_retried=2,
        queued=("m0004", "m0005"), ended=2, nodes=2, resources={"CPU": 16.0, "GPU": 4.0, "slot": 2.0},
        free={"CPU": 12.5, "GPU": 1.0}, warnings=(),
    )  # fmt: skip


def a_beta() -> BetaReply:
    """A fit that is good."""
    return BetaReply(measurement="m0003", policy_id="5f0c9a", **vars(Beta.from_json(a_result()["beta"])))


def a_variance() -> Variance:
    """Of four whole rounds; the fitter is a version ahead."""
    result = Result.from_json(a_result())
    names = (
        "advantage_variance", "advantage_mean_square", "advantage_mean_square_ratio", "advantage_paired", "gradient",
    )  # fmt: skip
    in_sample = {"none": 411.1, "constant": 117.3, "residual_mu": 23.9, "regression": 17.04}
    return Variance(
        "m0003", 4, 4, 2048, 81234, **{name: getattr(result, name) for name in names}, in_sample=in_sample,
        in_sample_version=5, mode="regression", features=("H", "sibling_mu"),
    )
