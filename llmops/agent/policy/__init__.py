"""What happens after an attempt: one pure function per backend."""
