"""Files, memory and processes of the operating system."""
