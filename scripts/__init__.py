"""Command-line tools of the repository: run them as modules, `python -m scripts.<name>`."""
