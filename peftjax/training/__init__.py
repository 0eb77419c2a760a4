"""Training: what `train` and `sweep` share, from a config to a finished run.

The step, the optimizer, evaluation, and the set-up, resumption and result of a run.
"""
