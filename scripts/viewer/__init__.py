"""A local page to ask a model, see where it looks, and browse its answers (`python -m scripts.viewer`)."""
