"""A smaller adapter, with what it loses measured."""
