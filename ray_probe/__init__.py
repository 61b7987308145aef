"""ray_probe: the gradient of a policy's response entropy, on a Ray cluster, unbiased and with error bars."""

__version__ = "0.1.1"
