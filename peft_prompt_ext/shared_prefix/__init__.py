"""The shared-prefix engine: the prompt runs once for a whole batch, and pads do not run at all."""
