"""``python -m llmops``: the same as the ``llmops`` command."""

from llmops.cli.main import entry

if __name__ == "__main__":
    entry()
