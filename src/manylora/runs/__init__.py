"""A run's folder and what happens in it: events, trackers, the console, and what a path is. Needs no torch."""
