"""The gradient of a policy's response entropy, unbiased and with errors, on Ray."""

__version__ = "0.1.1"
