"""Training: members, the one loop that steps them, and what a run leaves on disk."""
