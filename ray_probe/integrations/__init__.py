"""Hand a trainer's checkpoints to `ray-probe watch`.

They import the standard library alone, so that they load in any trainer's environment.
"""

from ray_probe.integrations.callback import ProbeCallback
from ray_probe.integrations.spool import hand_over, request

__all__ = ["ProbeCallback", "hand_over", "request"]
