"""The change of response entropy between two policies A and B. numpy only.

With `d_j` the log ratio log p_B - log p_A of the prefix before token j, `m_j = 2 tanh(d_j / 2)` and the mean entropy
`Hbar = (H_A + H_B) / 2`, the mean over responses drawn half from A and half from B of

    sum_j (H_B_j - H_A_j)  +  sum_k (m_(k+1) - m_k) (sum over j > k of Hbar_j - b_k)

is J(B) - J(A) exactly, for any baseline b that reads the prefix and other responses alone (docs/estimator.md, "The
change between two checkpoints"). The first sum is the pathwise part, the second the visitation part. With 1 in the
place of H the same sum is the change of the length.

Shape suffixes: S the two policies (A, B), T tokens of one response, K targets.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ray_probe.core.arrays import Array
from ray_probe.core.estimator.targets import future_sum

SIDES = ("a", "b")
MIDPOINT = len(SIDES)
"""The side of the policy halfway between both, in seeds."""
ENTROPY, LENGTH = 0, 1
"""The targets of a comparison's baseline: the mean entropy to come, and the tokens to come."""


@dataclass(frozen=True, eq=False)
class ComparedResponse:
    """A response scored under both policies.

    Attributes:
        side: the policy that sampled it: 0 for A, 1 for B.
        log_q_ST: log q of its tokens under each policy, nats; -inf where the other policy cannot sample the token.
        entropy_ST: H of each policy at each prefix, nats.
        outside_ST: the token lay outside the policy's recomputed nucleus.
    """

    side: int
    log_q_ST: Array
    entropy_ST: Array
    outside_ST: npt.NDArray[np.bool_]

    @classmethod
    def of(
        cls, side: int, log_q_ST: Array, entropy_ST: Array, outside_ST: npt.NDArray[np.bool_]
    ) -> "ComparedResponse":
        """Return a response from scores that take every token in S + {Y}.

        A token outside the other policy's nucleus alone cannot come from it. One outside both nuclei was inside when
        it was sampled and fell out by rounding; it stays in S + {Y} under both.
        """
        impossible_T = outside_ST[1 - side] & ~outside_ST[side]
        own_ST = log_q_ST.copy()
        own_ST[1 - side, impossible_T] = -np.inf
        return cls(side, own_ST, entropy_ST, outside_ST)

    @property
    def length(self) -> int:
        """Tokens of the response."""
        return int(self.log_q_ST.shape[1])

    @cached_property
    def mean_entropy_T(self) -> Array:
        """Hbar, the mean of both policies' entropies at each prefix, nats."""
        mean_T: Array = (self.entropy_ST[0] + self.entropy_ST[1]) / 2.0
        return mean_T

    @cached_property
    def log_ratio_T(self) -> Array:
        """Log ratio of the prefix through each token, B over A, nats.

        It is infinite from a token on that one policy cannot sample.
        """
        ratio_T: Array = np.cumsum(self.log_q_ST[1] - self.log_q_ST[0])
        return ratio_T

    @property
    def weight_step_T(self) -> Array:
        """`m_(k+1) - m_k` at each token; its sum lies in [-2, 2]."""
        step_T: Array = np.diff(2.0 * np.tanh(self.log_ratio_T / 2.0), prepend=0.0)
        return step_T

    @property
    def pathwise_T(self) -> Array:
        """`H_B - H_A` at each prefix, nats."""
        change_T: Array = self.entropy_ST[1] - self.entropy_ST[0]
        return change_T

    @property
    def target_TK(self) -> Array:
        """The baseline's targets at each token: Hbar to come (nats), and tokens to come."""
        return np.stack([future_sum(self.mean_entropy_T), np.arange(self.length - 1.0, -1.0, -1.0)], axis=1)

    def visitation_TK(self, mu_hat_TK: Array) -> Array:
        """Return the visitation part of each target at each token, under a baseline."""
        part_TK: Array = self.weight_step_T[:, None] * (self.target_TK - mu_hat_TK)
        return part_TK

    @property
    def impossible(self) -> int:
        """Number of tokens that the other policy cannot sample."""
        return int(np.isneginf(self.log_q_ST[1 - self.side]).sum())
