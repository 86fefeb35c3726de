"""The report: what the run store holds, as tables, pictures and advice. A pure function of the files it reads."""
