"""The tables of the paper: their cells and runs, the choice of learning rates, and reports.

It also holds the other steps of the workflow between data and tables.
"""
