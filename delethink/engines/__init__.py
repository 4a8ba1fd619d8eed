"""Engines: each implements the policy protocol and takes new weights."""
