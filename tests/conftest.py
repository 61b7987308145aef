"""One torch thread, as in an actor: results have fixed bits, and tests do not fight over two cores."""

import torch
from threadpoolctl import threadpool_limits

torch.set_num_threads(1)
threadpool_limits(limits=1)
