"""Records, ridge regression, baselines and variances of one round, in float64."""
