"""Images in, larger images out: no queue, no database and no bucket is known in here."""
