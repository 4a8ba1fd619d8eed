"""Scoring of traces: rewards, the scorer, the verifier pool and the code sandbox."""
