"""Settings for every test."""

from hypothesis import settings

# Tests check behaviour, never wall-clock time: a busy machine must not fail them.
settings.register_profile("delethink", deadline=None)
settings.load_profile("delethink")
