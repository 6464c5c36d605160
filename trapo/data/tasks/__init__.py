"""Problem generators are data sets that need no download."""
