"""Measurements of speed and memory, each against a bound taken in the same run."""
