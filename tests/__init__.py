"""A package, so that process groups spawned by a test can import what they run."""
