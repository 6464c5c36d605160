"""Problem generators: data sets that need no download."""
