"""The results as one page: `load` reads the store, `summary` compares, `tables` and `plots` draw, `page` writes."""
