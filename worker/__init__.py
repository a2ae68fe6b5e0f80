"""The processes that do the work: jobs, webhooks and sweeps, and the upscaler that turns images into larger ones."""
