"""Checkpoints on disk and in object stores: format, commits, verification, retention. Free of torch.

What turns tensors into these files and back is ``llm.train.checkpoint``.
"""
