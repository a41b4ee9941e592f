"""The experiments in small, which one machine without a GPU can repeat.

They share the data, the runs of other commands, and their reports.
"""
