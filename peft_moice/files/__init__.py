"""Files that are there as a whole or not at all, and whether stored weights can be read."""
