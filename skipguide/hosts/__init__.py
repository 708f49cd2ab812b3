"""Hosts: everything the core knows of other libraries' wrappers, hooks and caches, one file a library."""
