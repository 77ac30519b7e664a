"""One typed, checked configuration out of ``conf/``, the user's groups and the command line."""
