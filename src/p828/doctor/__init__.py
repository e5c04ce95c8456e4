"""Checks of a machine, and of a configuration on it, before a run: `p828 doctor`.

A check is a function that looks at one thing and returns a `Check`. A file holds the checks of one subject.
"""
