"""What may they: sender ownership, networks, rate limits. Pure."""
