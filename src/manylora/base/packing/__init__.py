"""Bases whose weights are packed: layers, folders, and how they are made."""
