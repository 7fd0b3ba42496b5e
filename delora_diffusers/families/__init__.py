"""Model families: one file each says what differs between them. ``table.py`` finds a model's family."""
