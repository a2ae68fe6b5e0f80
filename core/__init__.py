"""What the API and the workers must agree on: words, settings, storage, the hint. No HTTP framework, no SQL, no torch."""
