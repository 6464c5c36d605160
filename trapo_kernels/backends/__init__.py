"""This folder has the backends, a file or folder each. `base` says what one is, `dispatch` has the table of them and
picks one.

Nothing is imported here, so that what all of them share (`base`) can be imported without them.
"""
