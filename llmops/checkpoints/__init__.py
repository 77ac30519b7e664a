"""What ``llmops ckpt`` does, as functions: find checkpoints, say what they are, check them, remove what may go."""
