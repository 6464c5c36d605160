"""Packaging entry point; the metadata is in pyproject.toml.

Nothing is compiled in this version. Neither file asks for torch at build time: `make setup` installs torch first and
then this package with --no-build-isolation, so that there is one torch, the one that will run the code.
"""

from setuptools import setup

setup()
