"""What a cluster and this machine have: asked for, checked, and written down as a configuration."""
