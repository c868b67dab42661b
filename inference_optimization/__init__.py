"""Steering of LLaVA-1.5 at inference: AdaptViz."""
