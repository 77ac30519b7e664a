"""A study: many runs of one configuration with some values changed, as one object."""
