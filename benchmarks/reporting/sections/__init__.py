"""The parts of the report, each one function from the evidence to a section."""
