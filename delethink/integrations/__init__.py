"""Adapters to other libraries. Nothing in the core imports them."""
