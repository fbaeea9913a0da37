"""Quantised weights as plain data, read from files of many formats without the quantiser's package."""
