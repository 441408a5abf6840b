"""Teacher outputs on disk: pseudo-labels, their filters, cached states."""
