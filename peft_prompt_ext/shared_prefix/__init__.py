"""The shared-prefix engine: a prompt runs once for a whole batch, and pads do not run."""
