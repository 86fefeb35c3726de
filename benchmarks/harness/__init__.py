"""A grid of runs: `suite` names them, `measure` does one, `local` and `on_ray` do many, `store` keeps the rest."""
