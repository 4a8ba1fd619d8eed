"""The ``delethink`` command: parse first, import heavy things after."""
