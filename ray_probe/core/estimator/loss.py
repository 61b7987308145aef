"""The loss whose backward pass leaves +grad J.

Shape suffix: T tokens of one response.
"""

import torch
from torch import Tensor

from ray_probe.core.arrays import Array


def response_loss(log_q_T: Tensor, entropy_T: Tensor | None, advantage_T: Array) -> Tensor:
    """Return `sum_j A_j log q_j(Y_j) + sum_j H_j`, a float64 scalar with graph.

    Args:
        log_q_T: log q of the sampled tokens, with graph.
        entropy_T: entropies with graph (the pathwise term), or None to leave that term out.
        advantage_T: advantages; an array, so no gradient can flow through them.
    """
    score = (torch.from_numpy(advantage_T).to(log_q_T.device) * log_q_T.double()).sum()
    return score if entropy_T is None else score + entropy_T.double().sum()
