"""The pages that a run leaves: HTML, charts, and the report of a run. Needs no torch."""
