"""Tiny random checkpoints of every family, in the layout that the hub has."""
