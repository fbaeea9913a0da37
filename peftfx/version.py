"""The version of the package, which the build and the package both read without other imports."""

__version__ = "0.1.0"
