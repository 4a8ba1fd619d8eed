"""Pure reward functions (imported as ``delethink.rewards``)."""

if __name__ != "delethink.rewards":
    raise ImportError(f"import this package as 'delethink.rewards', not {__name__!r}")
