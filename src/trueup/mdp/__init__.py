"""Tabular Markov decision processes: the exact truth that estimators are tested against."""
