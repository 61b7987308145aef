"""What a run tells of its actors."""

from ray_probe.run.progress import Progress
from ray_probe.run.progress_tracker import ProgressTracker


def test_every_change_in_the_number_of_actors_is_told_once_with_what_was_asked_and_what_is_there() -> None:
    told: list[Progress] = []
    tracker = ProgressTracker(told.append, rounds=1, mode="none", actors=2)
    for asked, alive in ((2, 2), (2, 1), (2, 1), (4, 1), (4, 4), (4, 4)):
        tracker.staff(asked, alive)
    assert [(one.actors_asked, one.actors_alive) for one in told] == [(2, 1), (4, 1), (4, 4)]
    assert [one.note for one in told] == [
        "actors: asked 2, have 1", "actors: asked 4, have 1", "actors: asked 4, have 4",
    ]  # fmt: skip
