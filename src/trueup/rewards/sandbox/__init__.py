"""Untrusted Python in a process without network, files or privileges: see ``run``."""
