"""Sphinx settings. Build the site with ``sphinx-build -W -b html docs docs/_build``."""

project = "delethink"
copyright = "the delethink authors"
author = "the delethink authors"

extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "delethink"

# Headings get GitHub's anchors, so that links work both in the repository and in the site.
myst_heading_anchors = 4
smartquotes = False  # would turn the two hyphens of an option into a dash
