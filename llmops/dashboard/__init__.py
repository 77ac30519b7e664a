"""The web page of all runs: a server of JSON and events, and a page of plain modules in ``static``."""
