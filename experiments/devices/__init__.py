"""Whether devices compute the same: what is measured on each of them, in a process of its own."""
