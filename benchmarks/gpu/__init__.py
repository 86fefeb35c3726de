"""The command for a machine that has a GPU for minutes and no network."""
