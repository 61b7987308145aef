"""How many threads the arithmetic uses: it is part of what fixes a result's bits."""

import torch
from threadpoolctl import threadpool_limits


def pin_threads(count: int) -> None:
    """Use `count` threads in torch and in numpy's BLAS, in this process, from now on."""
    torch.set_num_threads(count)
    threadpool_limits(limits=count)
