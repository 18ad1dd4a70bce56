"""What pyproject.toml cannot say: nothing yet. The optional CUDA extension will stand here."""

from setuptools import setup

setup()
