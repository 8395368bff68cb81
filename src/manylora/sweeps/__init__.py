"""The search over settings: which trials are proposed, which are stopped early, and which one wins."""
