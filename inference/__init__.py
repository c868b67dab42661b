"""Answers of models to multi-image test sets, and their scores."""
