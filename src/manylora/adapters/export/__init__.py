"""The same adapter for another engine."""
