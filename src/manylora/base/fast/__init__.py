"""Faster forms of what stands in models that know nothing of them, switched on where they compute the same."""
