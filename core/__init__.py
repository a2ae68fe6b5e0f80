"""What the API and the workers must agree on: words, settings, storage, the hint. No HTTP framework, SQL or torch."""
