"""The mathematics of the probe: torch and numpy only.

`records`, `ridge`, `baselines` and `variance` need numpy alone, so that the fitter's process starts without torch;
for that reason this file imports nothing.
"""
