"""A file per allocator: which units go, by a pool and a target."""
