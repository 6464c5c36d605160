"""The parts of trapo/config.py that are no keys: how a key is written down, checked, hinted at and listed."""
