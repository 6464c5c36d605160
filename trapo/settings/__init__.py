"""This folder has the keys of a configuration, and says how a key is written down, checked, hinted at and listed."""
