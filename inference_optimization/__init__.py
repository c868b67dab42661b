"""Steering at inference: AdaptViz."""
