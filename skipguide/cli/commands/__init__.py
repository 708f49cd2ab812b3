"""The commands, one file each: a module with `register(subparsers)`."""
