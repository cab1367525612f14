"""One run of a study, what it costs, and the record it leaves."""
