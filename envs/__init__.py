"""Thinking environments and the tasks they play (imported as ``delethink.envs``)."""

if __name__ != "delethink.envs":
    raise ImportError(f"import this package as 'delethink.envs', not {__name__!r}")
