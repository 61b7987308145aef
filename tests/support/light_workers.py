"""A controller's workers in this process, without Ray and without a model."""

from ray_probe.gradient.layout import ParameterLayout
from ray_probe.run.backend import StopCheck
from ray_probe.run.messages import ActorFacts
from ray_probe.run.preparation.prepared import PreparedRun, baseline_rule
from support.light_rollout import LAYOUT, LightRollout
from support.workers import InProcessWorkers


class LightWorkers(InProcessWorkers):
    """One light rollout."""

    @property
    def layout(self) -> ParameterLayout:
        return LAYOUT

    def load(self, prepared: PreparedRun, stop: StopCheck) -> None:
        self._rollout = LightRollout(baseline_rule(prepared.config), prepared.policy_id)  # type: ignore[assignment]
        self.prepared = prepared
        self.info = ActorFacts(LAYOUT, "cpu", 1, 10**9)
