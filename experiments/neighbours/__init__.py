"""Nearest neighbors in feature spaces (figure 2): features, the search, and pages of the result."""
