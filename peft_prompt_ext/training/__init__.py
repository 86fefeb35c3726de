"""Training, scoring and answering one task: what `peft-prompt-ext train` and `predict` run on.

`methods` has the table of methods, `run` a training from its arguments to its results, `predictor` the answers to new
rows. DEFAULTS.md has the measurements behind the defaults.
"""
