"""What runs inside the servers under trial, each in its own virtual environment: nothing here may import the others."""
