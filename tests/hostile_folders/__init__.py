"""Model folders that are not what they claim, made at random, and how each command takes them."""
