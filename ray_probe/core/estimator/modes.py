"""Names of the baselines and of the fits, without numpy."""

from typing import Literal, get_args

Mode = Literal["none", "constant", "residual_mu", "regression"]
Fit = Literal["leave_one_out", "in_sample", "lagged"]
MODES: tuple[Mode, ...] = get_args(Mode)
