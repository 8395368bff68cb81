"""Ops: each a plain reference and fast versions with the same signature."""
