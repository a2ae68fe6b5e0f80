"""The HTTP side: stateless, never imports torch, never imports the workers."""
