"""Programs beside the training: checkpoints of other formats come in and go out."""
