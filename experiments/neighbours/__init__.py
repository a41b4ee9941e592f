"""Nearest neighbors in feature spaces (figure 2): features, the search, and the picture."""
