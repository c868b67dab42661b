"""Preference pairs from instructions: the true answer, and a wrong one that a model gave."""
