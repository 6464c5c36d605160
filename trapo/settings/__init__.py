"""The keys of a configuration, and how a key is written down, checked, hinted at and listed."""
