"""Apiframe's API v2: the dialect of our own clients too."""
