"""Protocol sources and their committed stubs."""
