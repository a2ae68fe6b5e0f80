"""Everything durable: the schema, and the guarded statements that change it."""
