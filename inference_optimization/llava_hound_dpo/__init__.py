"""Adaptive scaling of the attention on image tokens."""
