"""Does TRAPO do what it claims? A study that a laptop can rerun: `python -m study --help`."""
