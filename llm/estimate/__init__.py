"""What a run will take, worked out from its config. Free of torch: the launcher asks before anything is queued."""
