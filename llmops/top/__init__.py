"""``llmops top``: all runs in a full screen of a terminal. Needs Textual, which ``llmops[ui]`` installs."""
