"""The frozen base: loading it, its sites, and what is probed before anyone trains on it."""
