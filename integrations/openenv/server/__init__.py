"""Server of the thinking environment."""
