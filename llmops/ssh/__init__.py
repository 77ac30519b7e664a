"""One connection to a host through the system's OpenSSH, and a program of ours at its other end."""

READY = b"llmops is at the other end: "  # login scripts may print before it
