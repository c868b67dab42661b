"""Preference pairs of several runs as one data set, split without leaks and ready to be published; and back."""
