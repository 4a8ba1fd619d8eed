"""Rewards at work: scoring traces, the pool of verifier processes and the code sandbox."""
