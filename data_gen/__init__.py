"""Making multi-image training and test data from single-image data."""
